"""Sessions: `nox` runs lint, types and tests; the others by name, e.g. `nox -s quickstart`."""

import shutil
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"  # torch is gigabytes
nox.options.sessions = ["lint", "types", "tests"]

SOURCES = ("cogview_pl", "benchmarks", "tests", "noxfile.py")
KERNELS = (
    "tests/generation/engine/test_fused_gpu.py",
    "tests/kernels/test_nearest_code_triton.py",
    "tests/kernels/test_sampling_triton.py",
)
FEW_STEPS = (
    "trainer.max_steps=4",
    "trainer.val_check_interval=4",
    "data.train_size=256",
    "data.val_size=16",
    "num_prompts=4",
    "num_captions=4",
    "image_tokenizer.quantize_after_steps=0",
)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and common mistakes."""
    session.install("ruff>=0.9")
    session.run("ruff", "check", *SOURCES)
    session.run("ruff", "format", "--check", *SOURCES)


@nox.session
def types(session: nox.Session) -> None:
    """Type hints."""
    session.install("-e", ".[dev,eval]")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that need no GPU and less than ten minutes."""
    session.install("-e", ".[dev,eval,quant,formats,hf]")
    _run_tests(session)


def _run_tests(session: nox.Session, marked: str = "not slow and not gpu", **variables: str) -> None:
    workers = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")  # in order: the long files come early
    session.run("pytest", "-m", marked, *workers, *session.posargs, env={"OMP_NUM_THREADS": "1", **variables})


@nox.session(python="3.10", venv_backend="uv")
def lowest(session: nox.Session) -> None:
    """The default tests with the oldest Python and the oldest libraries that pyproject.toml allows."""
    session.install("--resolution", "lowest-direct", "-e", ".[dev,eval,quant]")
    _run_tests(session)


@nox.session(python=["3.10", "3.12", "3.13"], venv_backend="uv")
def pythons(session: nox.Session) -> None:
    """The default tests with other versions of Python, and the newest libraries."""
    session.install("-e", ".[dev,eval,quant]")
    _run_tests(session)


@nox.session
def sdist(session: nox.Session) -> None:
    """The default tests out of the source distribution, with a foreign package `tests` in the way."""
    session.install("build")
    folder = Path(session.create_tmp())
    shutil.rmtree(folder)
    session.run("python", "-m", "build", "--sdist", "--outdir", str(folder))
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    foreign = folder / "foreign" / "tests"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").touch()
    with session.chdir(folder / archive.name.removesuffix(".tar.gz")):
        session.install(".[dev,eval,quant]")
        _run_tests(session, PYTHONPATH=str(foreign.parent))


@nox.session
def slow(session: nox.Session) -> None:
    """The long tests."""
    session.install("-e", ".[dev,eval,quant,formats,hf]")
    _run_tests(session, "slow")


@nox.session
def faults(session: nox.Session) -> None:
    """The fault campaign: 400 kills, signals, full disks, changed inputs and flipped bits, in about ten minutes."""
    session.install("-e", ".[dev,eval,quant]")
    arguments = session.posargs or ("--injections", "400", "--seed", "0")
    session.run("python", "-m", "tests.faults.campaign", *arguments, env={"OMP_NUM_THREADS": "1"})


@nox.session
def quickstart(session: nox.Session) -> None:
    """The README's first command."""
    session.install("-e", ".[fonts]")
    session.run("python", "-m", "cogview_pl.run", "experiment=quickstart", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Speed on this machine beside references; name subjects or rows to run only those (see benchmarks/bench.py)."""
    session.install("-e", ".", "transformers>=5", "ctranslate2>=4.5", "vector-quantize-pytorch>=1.20", "matplotlib")
    session.run("python", "-m", "benchmarks.bench", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """All that needs a GPU: memory planned and measured, 4B finetunes on one card, fp16 under outliers, its tests."""
    session.install("-e", ".[dev,eval,quant]")
    session.run("python", "-m", "benchmarks.on_gpu", *session.posargs)
    session.run("pytest", "-m", "gpu")
    session.run("pytest", *KERNELS)  # elsewhere an interpreter runs them


@nox.session
def realfiles(session: nox.Session) -> None:
    """Pillow's test images, out of its source distribution, through decoding, vqvae and tokenize."""
    session.install("-e", ".[formats]", "opencv-python-headless>=4.10", "pip")  # environments of uv have no pip
    folder = Path(session.create_tmp())
    if not list(folder.glob("pillow-*.tar.gz")):
        session.run("python", "-m", "pip", "download", "--no-binary", ":all:", "--no-deps", "-d", str(folder), "pillow")
    archive = max(folder.glob("pillow-*.tar.gz"))
    session.run("python", "-m", "benchmarks.real_files", str(archive), *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it alone, run a few steps of the quickstart from another folder."""
    session.install("build")
    dist = Path(session.create_tmp())
    for old in dist.glob("*.whl"):
        old.unlink()
    session.run("python", "-m", "build", "--wheel", "--outdir", str(dist))
    (wheel,) = dist.glob("*.whl")
    session.install("--force-reinstall", str(wheel))
    with session.chdir(dist):
        session.run("python", "-m", "cogview_pl.run", "experiment=quickstart", *FEW_STEPS)
