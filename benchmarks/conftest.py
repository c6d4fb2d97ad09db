"""Where benchmarks run, what goes into every result, and the ceilings that they are measured against."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Callable, Generator, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.contenders import Contender, Place
from scripts.bench_report import table

RESULTS = Path(".benchmarks/latest.json")
PLACES = [Place("cpu", 1), Place("cpu", 2)]
if torch.cuda.is_available():
    PLACES.append(Place("cuda", 1))


def pytest_configure(config: pytest.Config) -> None:
    """Keep the results where scripts.bench_report looks for them: the table of later, which this run ends with too."""
    if config.getoption("benchmark_json") is None and not config.getoption("benchmark_disable"):
        RESULTS.parent.mkdir(exist_ok=True)
        config.option.benchmark_json = str(RESULTS)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before pytest-benchmark's, which is a wrapper too
def pytest_sessionfinish(session: pytest.Session) -> Generator[None]:
    """A benchmark that was interrupted before its first round has no figures, at which pytest-benchmark would fail."""
    if benchmarks := getattr(session.config, "_benchmarksession", None):
        benchmarks.benchmarks = [benchmark for benchmark in benchmarks.benchmarks if benchmark]
    yield


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's own
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """End with the table of what was timed, all of it or, interrupted, as much as there is."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    timed = [] if session is None else session.benchmarks
    entries = [{"name": b.name, "group": b.group, "extra_info": b.extra_info} for b in timed]
    for line in table(entries, date.today().isoformat()):
        terminalreporter.write_line(line)
    if not torch.cuda.is_available():
        terminalreporter.write_line("benchmarks: no CUDA device, so nothing was measured on a GPU")


@pytest.hookimpl(wrapper=True, tryfirst=True)  # tryfirst: has the last word
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A comparison that fails ends its benchmark before anything is timed: that is a failure, and not one more error
    of pytest-benchmark's fixture, which forgives tests that are skipped."""
    report = yield
    if call.when == "call" and report.failed:
        item.funcargs["benchmark"].skipped = True  # type: ignore[attr-defined]
    return report


@pytest.fixture(params=PLACES, ids=str)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Run with one and with two threads, and on the GPU where there is one."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param.threads)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every run compares and times the same inputs."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def machine(benchmark: Any) -> None:
    """Record where the benchmark ran; empty tensors are not filled, as they are in the tests."""
    torch.use_deterministic_algorithms(False)
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    benchmark.extra_info |= {"cpu": str(name), "torch": torch.__version__}
    if torch.cuda.is_available():
        benchmark.extra_info |= {"gpu": torch.cuda.get_device_name()}


@pytest.fixture(scope="session")
def fma_peak(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Place, float], Contender | None]:
    """A contender that makes multiply-adds in registers only; None where there is no compiler or no FMA."""
    compiler = shutil.which("c++") or shutil.which("g++")
    library = tmp_path_factory.mktemp("peak") / "peak.so"
    source = Path(__file__).with_name("peak.cpp")
    if compiler is None or platform.machine() != "x86_64":
        return lambda place, flop: None
    subprocess.run([compiler, "-O2", "-fopenmp", "-shared", "-fPIC", source, "-o", library], check=True)  # noqa: S603  # no input in it
    function = ctypes.CDLL(str(library)).fma_peak
    function.argtypes, function.restype = [ctypes.c_double, ctypes.c_int, ctypes.c_void_p], ctypes.c_double

    def contender(place: Place, flop: float) -> Contender | None:
        sink = torch.zeros(place.threads)

        def run() -> float:
            return function(flop / place.threads, place.threads, sink.data_ptr())

        done = run()
        return Contender(run, flop=done) if done else None

    return contender
