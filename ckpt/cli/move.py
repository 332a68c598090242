"""The commands that speak to other libraries: `export`, `import`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ckpt.cli.change import require_idle, takeover_option
from ckpt.console import (
    Json,
    byte_progress,
    count,
    find,
    json_option,
    open_at,
    output,
    plain,
    say,
    size,
    strict_fencing_option,
)
from ckpt.holder import Holder
from ckpt.interop import FORMATS, SHARD_BYTES, SOURCES, Format, Source
from ckpt.run import RunDirectory

if TYPE_CHECKING:
    from ckpt.interop.moving import Moved


_SUFFIXES: Final[dict[str, Format]] = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", ".bin": "torch"}


@click.command("export")
@click.argument("source", metavar="URL")
@click.argument("target", metavar="TO", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(FORMATS), help="Whose checkpoint to write; a file's name tells it.")
@click.option("--only", default="", metavar="KEY", help="What lies at this key, as `model`; names begin below it.")
@click.option("--max-shard-bytes", type=click.IntRange(1), default=SHARD_BYTES, show_default=True, help="For hf.")
@json_option
def export_run(source: str, target: Path, form: Format | None, only: str, max_shard_bytes: int, as_json: bool) -> None:
    """Write a step as a checkpoint of another library.

    URL is URL or URL@STEP. TO must not exist: a directory for hf and dcp, a file for safetensors and torch. Tensors
    come whole, whatever ranks saved them, and every byte is verified. Values (schedules, counts) go along with dcp
    and torch; what is each rank's own (random generators) stays behind.

    \b
    Examples:
      ckpt export /data/run@12000 gpt2 --format hf --only model
      ckpt export /data/run model.safetensors --only model
      ckpt export s3://bucket/run state.pt

    \b
    --json prints
      {"from": str, "step": int, "to": str, "format": str, "tensors": int,
       "values": int, "nbytes": int, "notes": [str]}
    """
    from ckpt.interop.moving import export_step
    from ckpt.restorer import StepReader

    form = form or _SUFFIXES.get(target.suffix)
    if form is None:
        raise click.UsageError(
            f"{target.name} does not tell what to write: --format hf or dcp for a directory, or torch"
        )
    run, view, number = open_at(source)
    commit = find(run, view, number)
    with byte_progress(commit.nbytes) as told:
        moved = export_step(StepReader(run, commit), target, form, only, max_shard_bytes, told)
    about = {"from": run.url, "step": commit.step, "to": str(target), "format": form}
    output({**about, **_json(moved)}, as_json, lambda found: _print(found, "exported to"))


@click.command("import")
@click.argument("source", metavar="FROM", type=click.Path(path_type=Path))
@click.argument("target", metavar="URL")
@click.option("--step", type=click.IntRange(min=0), required=True, metavar="N", help="Its step number in the run.")
@click.option("--format", "form", type=click.Choice(SOURCES), default="auto", show_default=True,
              help="Whose checkpoint it is.")  # fmt: skip
@click.option("--prefix", default="", metavar="KEY", help="Where it goes in the state, as `model`.")
@click.option("--only", default="", metavar="KEY", help="Only what lies at this key of the file.")
@click.option("--trust-pickle", is_flag=True, help="Run what a pickle says, in a process without network.")
@takeover_option
@strict_fencing_option
@json_option
def import_file(
    source: Path,
    target: str,
    step: int,
    form: Source,
    prefix: str,
    only: str,
    trust_pickle: bool,
    takeover: bool,
    strict_fencing: bool,
    as_json: bool,
) -> None:
    """Make a step of a run out of a checkpoint of another library.

    FROM is a file of safetensors or torch.save, a directory of DCP or in the layout of Hugging Face, or a folder of
    Accelerate's save_state, of the Trainer, or of weights in several pickled files (training). The run at URL is begun
    where there is none. Optimizers are stored by parameter, so that `checkpointer.restore({"model": model, "optim":
    optim})` finds them; where it cannot be said which parameter is which they are stored by number, for a restore
    without the model, and that is said. Pickles are never run without --trust-pickle. Exits 11 if a job holds the run.

    \b
    Examples:
      ckpt import gpt2/ /data/run --step 0 --prefix model
      ckpt import state.pt s3://bucket/run --step 12000
      ckpt import dcp/step-12000 /data/run --step 12000

    \b
    --json prints
      {"from": str, "step": int, "to": str, "attempt": str, "tensors": int,
       "values": int, "nbytes": int, "notes": [str]}
    """
    from ckpt.interop.moving import import_step

    run = RunDirectory.open(target, create=True)
    seen = run.log.read()
    require_idle(run, seen.holder, takeover, "Nothing was imported. Stop that job and pass --takeover")
    holder = Holder(run, run_id=None, takeover=takeover, strict_fencing=strict_fencing, seen=seen)
    with byte_progress(0) as told:
        commit, moved = import_step(
            source, holder, step, form, prefix=prefix, only=only, trust_pickle=trust_pickle, on_bytes=told
        )
    about = {"from": str(source), "step": step, "to": run.url, "attempt": commit.attempt}
    output({**about, **_json(moved)}, as_json, lambda found: _print(found, "imported to"))


def _json(moved: Moved) -> Json:
    return {"tensors": moved.tensors, "values": moved.values, "nbytes": moved.nbytes, "notes": list(moved.notes)}


def _print(found: Json, verb: str) -> None:
    for note in found["notes"]:
        say(plain(note))
    what = f"{count(found['tensors'], 'tensor')}, {size(found['nbytes'])}, and {count(found['values'], 'value')}"
    say(plain(f"step {found['step']}: {what} {verb} {found['to']}"))
