"""mars-instrument: a playable instrument, as an SFZ file with its samples."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mars.cli.errors import Command, user_errors
from mars.cli.options import Listed, families, pitches
from mars.text import printable


def _velocities(_: click.Context, __: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    words = value.split(",")
    if not all(word.isascii() and word.isdigit() and 1 <= int(word) <= 127 for word in words):
        raise click.BadParameter(f"want velocities from 1 to 127 such as 50,100,127; got {value!r}")
    return sorted({int(word) for word in words})


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", metavar="PATH|NAME", help="Run folder, model or packaged model; default: the packaged one.")
@click.option(
    "--family", cls=Listed, known=families,
    help="Instrument family, as trained on, e.g. one of {}; default: a random one.",
)  # fmt: skip
@click.option("--source", help="acoustic, electronic or synthetic; default: the family's most common one.")
@click.option("--instrument", metavar="NAME", help="One that the model was trained on; default: any.")
@click.option("--like", type=click.Path(path_type=Path), metavar="FILE", help="A sound whose timbre it is to have.")
@click.option("--pitch", callback=pitches, metavar="C3-C5", help="Or 48-72; default: as trained on.")
@click.option(
    "--every", type=click.IntRange(1, 24), default=3, show_default=True, help="Semitones from sample to sample."
)
@click.option(
    "--velocity", "velocities", callback=_velocities, metavar="50,100", help="Layers; default: 3 of those trained on."
)
@click.option("--tries", type=click.IntRange(min=1), default=8, show_default=True, help="Candidates for each note.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Another one: another timbre.")
@click.option("--allow-untrained", is_flag=True, help="Ask for what the model was not trained on, all the same.")
@click.option("--cfg", type=click.FloatRange(min=0), default=2.0, show_default=True, help="Guidance; 0: none.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Below 1: purer and more alike.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: PyTorch's choice.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print what was made, and where, as JSON.")
def main(out: Path, model: str | None, threads: int | None, device: str, as_json: bool, **settings: Any) -> None:
    """Make the folder OUT with an instrument to play: OUT/NAME.sfz for a sampler such as sfizz, and its samples.

    Each note is the one, of several, that has the pitch asked for and is nearest in timbre to a root note. It is
    trimmed, faded, put in tune by its measured pitch, and looped where it sustains. The model needs pitch as a
    condition.
    """
    with user_errors():
        _make(out, model, threads, device, as_json, settings)


def _make(
    out: Path, name: str | None, threads: int | None, device: str, as_json: bool, settings: dict[str, Any]
) -> None:
    from mars.cli.console import bars, print_json, result, say
    from mars.instrument.make import keys_of, make, velocities_of
    from mars.labels import Condition, note_name
    from mars.model import load
    from mars.runtime import set_threads

    set_threads(threads)
    model = load(name, device)
    began = time.monotonic()
    labels = {name: settings.pop(name) for name in ("family", "source", "instrument")}
    pitch, every, velocities = (settings.pop(key) for key in ("pitch", "every", "velocities"))
    (chosen,) = model.choose(1, **labels, seed=settings["seed"], allow_untrained=settings["allow_untrained"])
    condition: Condition = {**chosen, "pitch": None, "velocity": None}
    keys = keys_of(model, condition, (pitch, pitch) if isinstance(pitch, int) else pitch, every)
    layers = velocities_of(model, condition) if velocities is None else velocities
    about = ", ".join(str(value) for value in condition.values() if value is not None) or "any"
    low, high = note_name(keys[0]), note_name(keys[-1])
    say(f"{about}: {len(keys)} notes from {low} to {high}, {len(layers)} velocities, {settings['tries']} tries each")
    with bars(unit="notes") as tell:
        made = make(
            model, out, out.name, condition, keys, layers, progress=lambda done, n: tell("notes", done, n), **settings
        )
    if made.left_out:
        say(f"warning: no candidate had the pitch of {', '.join(made.left_out)}; notes beside them are played there")
    if made.octaves:
        say(f"warning: it sounds {abs(made.octaves)} octave{'s' * (abs(made.octaves) > 1)} "
            f"{'above' if made.octaves > 0 else 'below'} its keys, as the model renders these notes")  # fmt: skip
    seconds = time.monotonic() - began
    if as_json:
        print_json({**asdict(made), "sfz": str(made.sfz), "page": str(made.page), "seconds": seconds})
        return
    result(
        f"{made.notes} notes in {seconds:.1f} s: {made.looped} loop, retuned by up to {made.detuned:.0f} cents, "
        f"neighbours {made.neighbours:.1f} dB apart in timbre"
    )
    result(f"play: {printable(str(made.sfz))}; listen: {printable(str(made.page))}")


if __name__ == "__main__":
    main()
