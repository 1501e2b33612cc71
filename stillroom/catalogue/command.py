"""`stillroom run NAME`: the recipe's config fields and `RunOptions` are its flags."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from stillroom.catalogue import cards
from stillroom.catalogue.execute import execute, read_config
from stillroom.catalogue.idle import some_flags_idle
from stillroom.core.config import Count, NonNegative, Seed, check, flatten, override
from stillroom.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What every run takes, whatever the recipe."""

    out: Path | None = None
    """Run folder; continued if it holds the same run. Default: runs/NAME, with a suffix when flags differ from the defaults."""
    seed: Seed = 0
    """Seed of every random draw."""
    arm: str | None = None
    """Which of the recipe's arms to run; default: its method."""
    full: bool = False
    """Start from the paper's hyper-parameters instead of the laptop's."""
    tiny: bool = False
    """Start from a size of a few seconds, to see that everything works; its figures mean nothing."""
    baseline: bool = True
    """Also run the arm without the method, for the final table."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; default: an accelerator if there is one."""
    engine: Literal["auto", "local", "ddp", "fsdp2"] = "auto"
    """Processes; auto is ddp under a launcher such as torchrun."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks' forward passes."""
    accumulate: Count = 1
    """Chunks that each step's batch is split into, to save memory; the result is that of the whole batch."""
    threads: Count = 1
    """CPU threads. More than one slows small networks down; raise it for large ones."""
    deterministic: bool = False
    """Deterministic kernels on accelerators too (on CPU they are)."""
    save_seconds: NonNegative = 30.0
    """Time between checkpoints."""
    cache: Path | None = None
    """Folder of the store shared by runs; default: $STILLROOM_CACHE, else the platform's cache folder."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run folder."""
    overwrite: bool = False
    """Delete what the run folder holds and start again."""
    quiet: bool = False
    """No progress bar."""


def run_recipe(name: str, args: list[str]) -> None:
    """`stillroom run NAME …`: the recipe's config fields and RunOptions are its flags."""
    recipe = cards.load(name)
    if "--full" in args and "--tiny" in args:
        raise UserError("--full and --tiny are two sizes: give one.", code=2)
    preset = recipe.full() if "--full" in args else recipe.Config()
    if "--tiny" in args:
        preset = override(preset, getattr(recipe, "TINY", {}))
    flat = tyro.conf.arg(name="")  # no prefix for these two levels; nested ones keep theirs (--optimizer.lr)
    fields: list[Any] = [("options", Annotated[RunOptions, flat]), ("config", Annotated[recipe.Config, flat])]  # type: ignore  # a class known at run time
    kind: Any = dataclasses.make_dataclass("Flags", fields, namespace={"__doc__": recipe.__doc__})
    flags = tyro.cli(kind, args=args, default=kind(RunOptions(), preset), prog=f"stillroom run {name}")
    check(flags.options)
    check(flags.config)
    if flags.options.threads > (most := 4 * (os.cpu_count() or 1)):
        raise UserError(f"--threads {flags.options.threads} is out of range: on this machine it must be at most {most}.", code=2)
    _refuse_contradiction(recipe, flags.options.arm or _method(recipe)[0], flags.config, preset)
    execute_run(name, recipe, flags.options, flags.config)


def _method(recipe: Any) -> tuple[str, str | float | None]:
    """The arm that the recipe is about, and what it is held against."""
    return (recipe.CLAIMS[0].arm, recipe.CLAIMS[0].versus) if recipe.CLAIMS else (next(iter(recipe.ARMS)), None)


def _refuse_contradiction(recipe: Any, arm: str, config: Any, preset: Any) -> None:
    """UserError for a flag whose value the arm would silently replace."""
    given, usual, used = (flatten(c) for c in (config, preset, cards.config_of(recipe, arm, config)))
    for key, value in given.items():
        if used[key] != value != usual[key]:
            flag = f"--{key.replace('_', '-')} {value}"
            raise UserError(f"{flag} contradicts the arm {arm!r}, which sets {used[key]}: leave it out, or choose another --arm.", code=2)


def execute_run(name: str, recipe: Any, options: RunOptions, config: Any) -> None:
    import torch

    from stillroom.catalogue import report
    from stillroom.core import engine
    from stillroom.core.run import Run
    from stillroom.core.store import Store, fingerprint

    torch.set_num_threads(options.threads)
    if options.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    method, versus = _method(recipe)
    method = options.arm or method
    plain = options.arm is None and (config, options.seed) == (recipe.Config(), 0)
    suffix = "" if plain else f"-{fingerprint(config, options.seed, method)[:6]}"
    folder = options.out or Path("runs") / (name + suffix)
    placed = engine.make(options.engine, options.device, options.precision)
    if options.overwrite and folder.exists() and not placed.rank:
        _delete_run(folder)
    placed.barrier()
    began = read_config(folder) is not None or (folder.is_dir() and any(folder.iterdir()))
    settings: dict[str, Any] = {"engine": placed, "store": Store(options.cache), "accumulate": options.accumulate}
    settings |= {"save_seconds": options.save_seconds, "progress": not options.quiet, "tensorboard": options.tensorboard}
    try:
        with Run(folder, options.seed, **settings) as run:
            execute(name, cards.config_of(recipe, method, config), run, arm=method)
            if options.baseline and isinstance(versus, str) and versus != method:
                with some_flags_idle(), Run(folder / "baseline", options.seed, **settings) as other:
                    execute(name, cards.config_of(recipe, versus, config), other, arm=versus)
            if not run.rank:
                page = report.write(folder)
                report.print_table(report.table(folder))
                print(f"report: {page}")
        placed.end()
    except Exception as error:
        fits = not _cannot_fit(error)
        wrong_input = isinstance(error, UserError | OSError) or not fits
        if wrong_input and not began and not any(folder.rglob("*.pt")):  # nothing to continue from
            shutil.rmtree(folder, ignore_errors=True)
        if fits:
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{name} does not fit into this machine's memory ({reason}): give smaller counts, or --accumulate.") from error
    except KeyboardInterrupt:
        raise UserError(f"stopped; the last checkpoints are in {folder}. Give the same command to continue.") from None


def _cannot_fit(error: Exception) -> bool:
    """Whether a number of things is more than memory, or an integer, can hold; torch says so in words."""
    words = (
        "out of memory", "can't allocate memory", "not enough memory", "calculation overflowed", "multiplication overflow",
        "Overflow when unpacking", "too large to convert", "too big to convert",
    )  # fmt: skip
    return isinstance(error, MemoryError | OverflowError) or any(word in str(error) for word in words)


def _delete_run(folder: Path) -> None:
    """Only what is recognisably a run, and not in use, is deleted."""
    from filelock import FileLock, Timeout

    if read_config(folder) is None and any(path.name != ".lock" for path in folder.iterdir()):
        raise UserError(f"--overwrite: {folder} does not look like a run folder (it has no config.json), so it is left alone.", code=2)
    try:
        with FileLock(folder / ".lock", timeout=0):
            shutil.rmtree(folder)
    except Timeout:
        raise UserError(f"{folder} is in use by another live process.") from None
