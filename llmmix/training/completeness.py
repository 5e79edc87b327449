"""Which checkpoints of a run are complete, judged by the files themselves.

The Trainer writes weights, optimizer, scheduler and random states, and `trainer_state.json` last.
A kill or a full disk on the way leaves a folder that cannot be resumed. Nothing is unpickled here,
and of a large file only its ends are read.
"""

import json
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

STATE = "trainer_state.json"
NAME = re.compile(r"checkpoint-(\d+)")
DEEPSPEED = "latest"  # names the folder where DeepSpeed keeps weights, optimizer and scheduler
WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("adapter_model.*", "*/adapter_model.*"),
    *("pytorch_model_fsdp.bin", "pytorch_model_fsdp_*"),
    DEEPSPEED,
)
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_*", DEEPSPEED)
SCHEDULER = ("scheduler.pt", DEEPSPEED)
RANDOM = ("rng_state*.pth",)
NEEDED = {  # one of the files or folders of each
    (*OPTIMIZER, *SCHEDULER, *RANDOM): "it holds the model alone (`save_only_model`)",
    WEIGHTS: "it has no weights",
    OPTIMIZER: "it has no optimizer state",
    SCHEDULER: "it has no scheduler.pt",
    RANDOM: "it has no random state (rng_state.pth)",
}


def checkpoints_of(folder: str | Path) -> list[Path]:
    """The checkpoint folders of a run, complete or not, first to last."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir()]
    steps = {int(match[1]): path for path in found if (match := NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoint folders of a run that can be resumed, first to last."""
    return [path for path in checkpoints_of(folder) if why_incomplete(path) is None]


def why_incomplete(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed, as the end of a sentence; None if it can."""
    return next(_faults(checkpoint), None)


def _faults(checkpoint: Path) -> Iterator[str]:
    if not checkpoint.is_dir():
        yield "there is no such folder"
        return
    if not (checkpoint / STATE).is_file():
        yield f"it has no {STATE}, which is written last"
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and (fault := fault_of(path)):
            yield f"{path.relative_to(checkpoint)} {fault}"
    state = json.loads((checkpoint / STATE).read_bytes())
    step = state.get("global_step") if isinstance(state, dict) else None
    if (named := NAME.fullmatch(checkpoint.name)) and step != int(named[1]):
        yield f"its {STATE} is of step {step}"
    yield from _missing(checkpoint)


def _missing(checkpoint: Path) -> Iterator[str]:
    """What a checkpoint whose files are whole lacks."""
    for patterns, fault in NEEDED.items():
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            yield fault
    for adapter in (*checkpoint.glob("adapter_model.*"), *checkpoint.glob("*/adapter_model.*")):
        if not adapter.with_name("adapter_config.json").is_file():
            yield f"{adapter.relative_to(checkpoint)} has no adapter_config.json beside it"
    ranks = {int(path.stem.split("_")[2]) for path in checkpoint.glob("rng_state_*.pth")}
    for rank in sorted(set(range(max(ranks, default=0))) - ranks):
        yield f"it has no random state of rank {rank}"
    # Sharded by torch, which writes the list of what the shards hold last
    for shards in (*checkpoint.glob("pytorch_model_fsdp_*"), *checkpoint.glob("optimizer_*")):
        if shards.is_dir() and not (shards / ".metadata").is_file():
            yield f"{shards.name} has no .metadata, which is written last"


def fault_of(path: Path) -> str | None:
    """What is wrong with a file of a checkpoint, by its own format; None if it is whole."""
    size = path.stat().st_size
    kind = path.suffix
    if size == 0 and kind in (".json", ".safetensors", ".pt", ".pth", ".bin", ".distcp"):
        return "is empty"
    if kind == ".safetensors" and not is_whole_safetensors(path):
        return "is not whole"
    if kind in (".pt", ".pth", ".bin") and not _is_whole_zip(path):
        return "is not whole"
    if path.name == DEEPSPEED:
        return _fault_of_deepspeed(path)
    if kind != ".json":
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return "is not whole"
    shards = content.get("weight_map", {}) if path.name.endswith(".index.json") else {}
    absent = {name for name in shards.values() if not (path.parent / name).is_file()}
    return f"names {min(absent)}, which is missing" if absent else None


def is_whole_safetensors(path: Path) -> bool:
    """Whether a file of safetensors is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    ends = [part["data_offsets"][1] for part in header.values() if "data_offsets" in part]
    return 8 + length + max(ends, default=0) == size


def _is_whole_zip(path: Path) -> bool:
    """Whether a file of `torch.save` has its directory, which is at its end."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return True  # of another format
    try:
        with zipfile.ZipFile(path):
            return True
    except zipfile.BadZipFile:
        return False


def _fault_of_deepspeed(latest: Path) -> str | None:
    """What is wrong with the folder that DeepSpeed's `latest` names."""
    name = latest.read_text(encoding="utf-8").strip()
    if not name or not any((latest.parent / name).glob("*model_states.pt")):
        return f"names {name or 'nothing'}, which holds no model states"
    return None
