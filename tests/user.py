"""What a user may write: checked by mypy in the strict mode (tests/test_public.py), and not run.

Each `type: ignore` is a mistake that mypy must see: one that it does not need is an error too.
"""

from pathlib import Path
from typing import assert_type

import numpy as np
from torch import Tensor

import mars
from mars.errors import CheckpointError, ConfigError

model: mars.Model = mars.load()
assert_type(mars.load("runs/var", device="cuda"), mars.Model)
assert_type(mars.Model.from_pretrained("user/name", revision="main"), mars.Model)
assert_type(model.to("cpu"), mars.Model)

notes = model.generate(64, pitch=(48, 72), family="organ", seed=0)
assert_type(notes, list[mars.Note])
for note in model.iterate(3, start=2, cfg=0.0, precision="float32", progress=lambda done, of: None):
    assert_type(note, mars.Note)
    assert_type(note.waveform, Tensor)
    assert_type(note.sample_rate, int)
    assert_type(note.label, str)
    assert_type(note.spectrogram(), Tensor)
    assert_type(note.condition.get("pitch"), int | None)
    note.save("x.wav")
    note.save(Path("x.wav"))

wanted: mars.Condition = {"family": "organ", "pitch": 60}
model.generate(1, conditions=[wanted])
model.generate(1, conditions=[{"family": None}])
assert_type(model.encode(np.zeros((1, 64000), np.float32)), Tensor)
assert_type(model.decode(model.encode(notes[0].waveform[None]), iterations=4, seed=1), Tensor)
model.save("kept")
model.save_pretrained(Path("kept"))
assert_type(model.push_to_hub("user/name", private=True), str)

try:
    mars.load("nothing")
except (CheckpointError, ConfigError) as error:
    assert_type(error.code, int)
except mars.MarsError:
    raise

model.generate("64")  # type: ignore[arg-type]
model.generate(64, velocity="loud")  # type: ignore[arg-type]
model.generate(64, families="organ")  # type: ignore[call-arg]
model.generate(64, precision="float16")  # type: ignore[arg-type]
model.generate(1, conditions=[{"colour": "red"}])  # type: ignore[typeddict-unknown-key]
wrong: mars.Condition = {"velocity": "loud"}  # type: ignore[typeddict-item]
note.label = "x"  # type: ignore[misc]
model.encode([0.0])  # type: ignore[arg-type]
mars.loud()  # type: ignore[attr-defined]
