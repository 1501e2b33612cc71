"""The `stillroom` command. Flags are dataclass fields, read by tyro; a recipe is imported only when its command needs it.

Exit codes: 0 done, 1 failed, 2 usage.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import Positional

from stillroom.catalogue import cards
from stillroom.catalogue import ledger as ledgers
from stillroom.core.config import Count, Natural
from stillroom.core.errors import UserError

app = tyro.extras.SubcommandApp()


@app.command(name="list")
def list_(family: Positional[str | None] = None) -> None:
    """The catalogue by family, with the verdict of each claim.

    Args:
        family: show only this family.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    chosen = [card for card in cards.cards().values() if family in (None, card.family)]
    if not chosen:
        raise UserError(
            f"no family is called {family!r}; there are {', '.join(sorted({c.family for c in cards.cards().values()}))}.", code=2
        )
    ledger = ledgers.deciding()
    table = Table("recipe", "what it does", "claims", box=None, header_style="bold", pad_edge=False)
    for group in sorted({card.family for card in chosen}):
        table.add_row(f"[bold]{group}[/]")
        for card in (c for c in chosen if c.family == group):
            marks = {"holds": "[green]holds[/]", "fails": "[red]fails[/]", "undecided": "[yellow]undecided[/]"}
            verdicts = [c["verdict"] for c in ledger.get(card.name, {}).get("claims", [])]
            counts = ", ".join(f"{verdicts.count(v)} {marks[v]}" for v in marks if v in verdicts)
            table.add_row(
                f"  {card.name}", escape(card.title) + (" [dim](baseline)[/]" if card.baseline else ""), counts or "[dim]not verified[/]"
            )
    Console().print(table)


@app.command
def show(name: Positional[str]) -> None:
    """The card of a recipe: what it is, its arms, claims with verdicts and cost, and its flags.

    Args:
        name: a recipe of `stillroom list`.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from stillroom.catalogue.report import paragraphs
    from stillroom.core.config import flatten

    card, recipe = cards.find(name), cards.load(name)
    entry, other = ledgers.deciding().get(name, {}), ledgers.read_ledger().get(name, {})
    console = Console(highlight=False)
    facts = [card.family, *(["baseline"] if card.baseline else []), *(["runs under FSDP2"] if hasattr(recipe, "FSDP2") else [])]
    console.print(f"[bold]{name}[/]  ({', '.join(facts)})\n")
    for kind, block in paragraphs((recipe.__doc__ or "").strip()):
        console.print(block + "\n", markup=False, no_wrap=kind == "pre", overflow="ignore", crop=False)
    table = Table("arm", "differs by", "seconds a seed", box=None, header_style="bold", pad_edge=False)
    for arm, changes in recipe.ARMS.items():
        differs = ", ".join(f"{k} = {v}" for k, v in changes.items()) or "the defaults"
        table.add_row(escape(arm), escape(differs), str(entry.get("arms", {}).get(arm, {}).get("seconds", "")))
    console.print(table, "")
    verdicts, first = ({claim["text"]: claim["verdict"] for claim in each.get("claims", [])} for each in (entry, other))
    for claim in recipe.CLAIMS:
        text = escape(f"claim: {claim.text}: {claim.metric} of {claim.arm} {claim.better} than {claim.versus}")
        beside = f" (first seeds: {first[claim.text]})" if entry.get("first_seed") and claim.text in first else ""
        console.print(f"{text}  [bold]{verdicts.get(claim.text, 'not verified')}[/]{beside}")
    console.print(f"\nflags of `stillroom run {name}` (--help explains them), laptop default and paper:")
    small, full = flatten(recipe.Config()), flatten(recipe.full())
    for key, value in small.items():
        paper = f"   paper: {full[key]}" if full[key] != value else ""
        console.print(f"  --{key.replace('_', '-')} {value}{paper}", markup=False)


@app.command(name="run")
def run_(name: Positional[str]) -> None:
    """Run a recipe and the same without its method; print the final table and write a report. `stillroom run NAME --help`: its flags.

    Args:
        name: a recipe of `stillroom list`.
    """


@app.command
def search(name: Positional[str]) -> None:
    """Search the flags of a recipe for better ones, config by config and seed by seed. `stillroom search NAME --help`: its flags.

    Args:
        name: a recipe of `stillroom list`.
    """


@app.command
def verify(
    name: Positional[str | None] = None,
    all: bool = False,
    seeds: Count = 5,
    jobs: Count = 2,
    backend: Literal["loky", "ray", "dask"] = "loky",
    first_seed: Natural = 0,
    out: Path = Path("runs/verify"),
    ledger: Path | None = None,
    cache: Path | None = None,
) -> None:
    """Check a recipe's claims on this machine: every arm over paired seeds, one table, and an entry of the ledger.

    Args:
        name: a recipe of `stillroom list`.
        all: every recipe.
        seeds: paired seeds.
        jobs: arm-seeds at once, each on one thread.
        backend: joblib's: processes here, or the ray or dask cluster that this process is connected to.
        first_seed: the first of them. From another one than 0 the entry goes beside the ledger's, which stays as it is: a check of it on
            draws that no setting was chosen by.
        out: where the runs are kept; what finished there is not run again.
        ledger: folder of the ledger; default: this checkout's, else ./ledger.
        cache: the store; default: $STILLROOM_CACHE, else the platform's cache folder.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from tqdm import tqdm

    from stillroom.catalogue import claims

    if (name is None) == (not all):
        raise UserError("give the name of a recipe, or --all.", code=2)
    for flag, value, least in (("seeds", seeds, 1), ("jobs", jobs, 1), ("first-seed", first_seed, 0)):
        if value < least:
            raise UserError(f"--{flag} {value} is out of range: it must be at least {least}.", code=2)
    for each in cards.cards() if name is None else [name]:
        arms = len(cards.load(each).ARMS)
        with tqdm(total=arms * seeds, desc=each, leave=False, disable=None) as bar:

            def progress(line: str, bar: Any = bar) -> None:
                bar.update()
                bar.set_postfix_str(line)

            entry = claims.verify(each, seeds, jobs, folder=out, cache=cache, backend=backend, progress=progress, first_seed=first_seed)
        file = ledgers.write_ledger(entry, ledger)
        table = Table(
            "claim",
            "metric",
            "arm",
            "versus",
            "difference [95 %]",
            "margin",
            "verdict",
            title=f"{each}, {seeds} seeds from {first_seed}",
            title_justify="left",
        )
        for c in entry["claims"]:
            versus, number = str(c["versus"]), ledgers.number(c["margin"])
            table.add_row(*map(escape, (c["text"], c["metric"], c["arm"], versus, ledgers.interval(c), number, c["verdict"])))
        Console().print(table)
        print(f"written: {file}")


@app.command
def ledger(folder: Path | None = None, out: Path = Path("docs/ledger.md"), stale: bool = False) -> None:
    """Write docs/ledger.md anew from the ledger's entries, or list those that today's code did not make.

    Args:
        folder: of the entries; default: this checkout's ledger, else ./ledger.
        out: the page.
        stale: only list the entries whose recipe, or something that it rests on, has changed since: they want verifying anew.
    """
    from stillroom.core.store import write_atomic

    if stale:
        return print("\n".join(ledgers.stale(folder)) or "every entry was made by today's code")
    if out.is_dir() or not out.name:
        raise UserError(f"--out {out} is a folder: name a file, such as {out / 'ledger.md'}.", code=2)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, ledgers.as_markdown(ledgers.read_ledger(folder), ledgers.read_ledger(folder, fresh=True)))
    print(out)


@app.command
def compare(runs: Positional[tuple[Path, ...]], out: Path = Path("compare.html")) -> None:
    """One page for several runs: their tables, curves and configs side by side.

    Args:
        runs: run folders.
        out: the page.
    """
    from stillroom.catalogue import report

    print(report.compare(list(runs), out))


@app.command
def export(run: Positional[Path], to: Literal["safetensors", "onnx", "torch-export"], out: Path | None = None) -> None:
    """Write a run's student in a format for deployment, check it against PyTorch and time it; the report then shows both.

    Args:
        run: folder of a run, or of a saved student.
        to: safetensors and config in the student's own library, ONNX, or torch.export.
        out: the folder to write; default: RUN/exported/FORMAT.
    """
    from stillroom.catalogue import report
    from stillroom.catalogue.export import export as write

    folder, rows = write(run, to, out)
    report.print_table([{"name": name, **row} for name, row in rows.items()])
    print(f"written and checked: {folder}")


@app.command
def cache(clear: bool = False, name: str | None = None, folder: Path | None = None) -> None:
    """List what runs share (trained teachers, teacher signals), with sizes; or clear it.

    Args:
        clear: delete the entries that no process is using.
        name: only entries of this name.
        folder: the store; default: $STILLROOM_CACHE, else the platform's cache folder.
    """
    import time

    from rich.console import Console
    from rich.table import Table

    from stillroom.catalogue import cache as cache_
    from stillroom.core.store import Store

    store = Store(folder)
    if clear:
        count, size = cache_.clear(store, name)
        return print(f"deleted {count} entries, {size / 1e6:.1f} MB")
    table = Table("entry", "MB", "last used", "folder", box=None, header_style="bold", pad_edge=False)
    entries = [e for e in cache_.entries(store) if name in (None, e["name"])]
    for e in entries:
        table.add_row(e["name"], f"{e['bytes'] / 1e6:.2f}", time.strftime("%Y-%m-%d %H:%M", time.localtime(e["used"])), e["folder"].name)
    Console().print(table)
    print(f"{len(entries)} entries, {sum(e['bytes'] for e in entries) / 1e6:.1f} MB in {store.folder}")


def main(args: list[str] | None = None) -> int:
    """Parse and execute; the exit code. A UserError is printed without a traceback."""
    args = sys.argv[1:] if args is None else args
    try:
        if args[:1] == ["run"] and len(args) > 1 and not args[1].startswith("-"):
            from stillroom.catalogue import command

            command.run_recipe(args[1], args[2:])
        elif args[:1] == ["search"] and len(args) > 1 and not args[1].startswith("-"):
            from stillroom.search import command as searching

            searching.main(args[1], args[2:])
        else:
            app.cli(args=args, prog="stillroom", description="Model distillation: run published systems, and check their claims.")
    except UserError as error:
        print(f"stillroom: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("stillroom: stopped; what was finished is kept, so give the same command to continue.", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who reads has seen enough: `| head` gets no message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if (error.filename is None and error.errno is None) or os.environ.get("STILLROOM_TRACEBACK"):
            raise
        print(f"stillroom: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2 if stop.code else 0
    return 0
