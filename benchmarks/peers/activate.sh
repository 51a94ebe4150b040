# Source this on the GPU machine: unpacks the peers once and puts them on PYTHONPATH; status 1 if it
# cannot, with nothing changed but the folder.
# Copied beside the wheels by collect.sh. Environment: PEERS_SITE, the folder to unpack into.
peers=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
site=${PEERS_SITE:-${TMPDIR:-/tmp}/fork-attn-peers-site}
if [ ! -f "$site/.ready" ]; then
    "${PYTHON:-python3}" -m pip --disable-pip-version-check install -q --no-index --no-deps --no-compile \
        --no-cache-dir --upgrade --target "$site" "$peers"/*.whl || return 1
    "${PYTHON:-python3}" - "$peers" "$site" <<'PY' || return 1
import lzma
import pathlib
import shutil
import sys
import tarfile

peers, site = map(pathlib.Path, sys.argv[1:])
modules = site / "flashinfer" / "data" / "aot"
modules.mkdir(parents=True, exist_ok=True)
with lzma.open(peers / "flashinfer-modules.tar.xz") as packed, tarfile.open(fileobj=packed) as tar:
    tar.extractall(modules, filter="data")
(site / "flash_attn_3").mkdir(exist_ok=True)
with lzma.open(peers / "fa3.xz") as packed, open(site / "flash_attn_3" / "_C.abi3.so", "wb") as out:
    shutil.copyfileobj(packed, out)
for path in peers.glob("flash_attn_*.py"):
    shutil.copy(path, site)
(site / ".ready").touch()
PY
fi
# FlashInfer must use the modules that were carried: there is no time here to compile others.
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} FLASHINFER_DISABLE_JIT=1
export FLASHINFER_WORKSPACE_BASE=${TMPDIR:-/tmp}/fork-attn-flashinfer
