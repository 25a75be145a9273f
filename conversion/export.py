"""Write a converted model folder (docs/checkpoint_format.md): atomically, never over another.

Weights keep their names, shapes and dtypes, so that plain transformers still loads the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from conversion.errors import ConversionError
from conversion.trained_weights import write_shards
from engine.model.checkpoint import AGE_BIAS, INDEX_FILE, INDEXER_FILE, Checkpoint, preflight
from engine.model.config import SparseAttentionConfig
from engine.model.decoder import Indexer
from engine.model.sparse_section import FORMAT_VERSION

# Files that belong to a model besides config and weights; what is not there is not copied.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)


def sparse_section(sparse: SparseAttentionConfig, calibration: dict[str, Any]) -> dict[str, Any]:
    """The "rtpurbo" section of config.json. `top_p` is one number if all heads agree."""
    values = [p for layer in sparse.top_p for p in layer]
    same = len(set(values)) == 1
    return {
        "format_version": FORMAT_VERSION,
        "retrieval_heads": [list(heads) for heads in sparse.retrieval_heads],
        "window_tokens": sparse.window_tokens,
        "sink_tokens": sparse.sink_tokens,
        "index_dim": sparse.index_dim,
        "index_scope": sparse.index_scope,
        "index_age_bias": sparse.index_age_bias,
        "block_tokens": sparse.block_tokens,
        "top_p": values[0] if same else values,
        "dense_below": sparse.dense_below,
        "calibration": calibration,
    }


def export_model(
    source: Checkpoint,
    out: Path,
    sparse: SparseAttentionConfig,
    indexers: Sequence[Indexer | None],
    calibration: dict[str, Any],
    trained: Path | None = None,
) -> None:
    """Make the folder `out`.

    Args:
        trained: weights that stage 2 has changed, by checkpoint name; None keeps the source's.

    Raises:
        ConversionError: `out` exists, or cannot be written.
    """
    with new_folder(out) as work:
        _fill(work, source, sparse_section(sparse, calibration), indexers, trained)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A model folder to fill. It is made beside its place and becomes `out` when it is complete and
    has passed the same checks as before serving.

    Raises:
        CheckpointError: it does not pass.
        ConversionError: `out` exists, or cannot be written.
    """
    refuse_existing(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ConversionError(f"{out}: cannot be made ({error.strerror})") from None
    try:
        yield work
        preflight(work)
        refuse_existing(out)
        for file in work.iterdir():
            file.chmod(0o644)
        work.chmod(0o755)
        os.rename(work, out)
    except OSError as error:
        raise ConversionError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def copy_files(source: Path, names: Iterable[str], folder: Path) -> None:
    """Those of the named files that `source` has."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def refuse_existing(out: Path) -> None:
    """Raises ConversionError if something is at `out`, even a broken link."""
    if os.path.lexists(out):
        raise ConversionError(f"{out}: exists already; name a folder that does not")


def _fill(
    folder: Path,
    source: Checkpoint,
    section: dict[str, Any],
    indexers: Sequence[Indexer | None],
    trained: Path | None,
) -> None:
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("headwise_config", None)  # one head map per folder
    config["rtpurbo"] = section
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    if trained is not None:
        write_shards(source, trained, folder)
    else:
        for file in sorted({stored.file for stored in source.tensors.values()}):
            shutil.copyfile(file, folder / file.name)
    copy_files(source.folder, (INDEX_FILE, *COMPANIONS), folder)
    tensors = {}
    for layer, indexer in enumerate(indexers):
        if indexer is not None:
            prefix = f"model.layers.{layer}.self_attn.indexer."
            tensors[prefix + "q_proj.weight"] = indexer.q_proj_HID.contiguous()
            tensors[prefix + "k_proj.weight"] = indexer.k_proj_HID.contiguous()
            if indexer.age_bias_HA is not None:
                tensors[prefix + AGE_BIAS] = indexer.age_bias_HA.float().contiguous()
    save_file(tensors, folder / INDEXER_FILE, metadata={"format": "pt"})
