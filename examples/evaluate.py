"""How good a model is: its tokenizer's reconstructions, and its new notes, beside what the numbers mean.

    pip install -e '.[eval]'
    python examples/evaluate.py --out evaluations/example

docs/metrics.md says how to read the figures. Each report has three rows beside the model's: real notes against other
real ones, real notes that went through Griffin-Lim alone, and real notes made worse on purpose.
"""

import argparse
from pathlib import Path

from mars import evaluate

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("evaluations/example"), help="Folder for notes and reports.")
parser.add_argument("-n", type=int, default=64, help="How many notes.")
parser.add_argument("--model", help="Folder of a run or of a model; without it, the packaged one.")
parser.add_argument(
    "--data", type=Path, help="Real notes: a folder or a packed dataset; without it, the built-in ones."
)
parser.add_argument("--metrics", default="", help="Some, as in mse,pkid; without it, all that can be computed.")
arguments = parser.parse_args()

metrics = tuple(filter(None, arguments.metrics.split(",")))
options = evaluate.Options(preset="tiny", metrics=metrics, bins=10)  # the small classifiers that come with mars
for name, measure in (("reconstruction", evaluate.reconstruct), ("generation", evaluate.generate)):
    result = measure(
        arguments.out / name, options, model=arguments.model, data=arguments.data, n=arguments.n, say=print
    )
    print(f"{name}: {', '.join(map(str, result.files))}")
    for metric, figure in result.report.metrics.items():
        print(f"  {metric:16} {'-' if figure.value is None else format(figure.value, '.4g')}")
