"""`make fuzz`: each target for some minutes, led by the coverage that its inputs reach (atheris).

    python -m kalshi_platform_tests.fuzz.campaign [--seconds 60] [TARGET …]

Every target runs in a process of its own, since the fuzzer ends it on a finding. The last lines say how
many inputs were run and how much of the code they reached; an input that broke a promise is kept in
`data/fuzz/`, and `--input FILE TARGET` runs it alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import click

FOUND = Path("data/fuzz")
LIMITS = (
    "-timeout=30",
    "-rss_limit_mb=4096",
    "-max_len=4096",
    "-print_final_stats=1",
    "-len_control=0",
)
_DONE = re.compile(r"Done (\d+) runs in (\d+) second")
_COVERAGE = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")


@click.command()
@click.argument("names", nargs=-1)
@click.option("--seconds", default=60, show_default=True, help="For each target.")
@click.option("--input", "one", type=click.Path(path_type=Path, exists=True), help="Run it alone.")
@click.option("--alone", is_flag=True, hidden=True)
def main(names: tuple[str, ...], seconds: int, one: Path | None, *, alone: bool) -> None:
    """Fuzz the TARGETs, default: all."""
    if one is not None:
        _run_one(names[0], one)
    elif alone:
        _fuzz(names[0], seconds)
    else:
        _campaign(names, seconds)


def _run_one(name: str, path: Path) -> None:
    from kalshi_platform_tests.fuzz.targets import TARGETS

    with TARGETS[name].open() as run:
        run(path.read_bytes())
    click.echo(f"{name}: {path} breaks no promise")


def _campaign(names: tuple[str, ...], seconds: int) -> None:
    from kalshi_platform_tests.fuzz.targets import TARGETS

    broken = []
    for name in names or tuple(TARGETS):
        process = subprocess.run(
            [sys.executable, "-m", __spec__.name, name, "--seconds", str(seconds), "--alone"],
            env={**os.environ, "POLARS_MAX_THREADS": "1"},  # frames by the dozen: threads only cost
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        done, reached = _DONE.search(process.stderr), _COVERAGE.findall(process.stderr)
        if process.returncode or done is None:
            broken.append(name)
            click.echo(process.stdout[-4000:] + process.stderr[-4000:], err=True)
            continue
        edges, _, inputs = reached[-1] if reached else ("0", "0", "0")
        click.echo(
            f"{name}: {int(done[1]):,} inputs in {done[2]} s, {int(edges):,} branches reached,"
            f" {inputs} inputs that reach something of their own. Promise: {TARGETS[name].promise}"
        )
    if broken:
        raise click.ClickException(f"a promise is broken: {', '.join(broken)}; see {FOUND}/")


def _fuzz(name: str, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["kalshi_platform"]):
        from kalshi_platform_tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    FOUND.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as corpus, target.open() as run:
        for number, seed in enumerate(target.seeds):
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
        limits = [*LIMITS, f"-max_total_time={seconds}", f"-artifact_prefix={FOUND}/{name}-"]

        def kept(data: bytes) -> None:
            try:
                run(data)
            except BaseException:  # the fuzzer ends the process without a word where it is
                digest = hashlib.sha256(data).hexdigest()[:16]
                (FOUND / f"{name}-broken-{digest}").write_bytes(data)
                raise

        atheris.Setup([sys.argv[0], *limits, corpus], kept, enable_python_coverage=True)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
