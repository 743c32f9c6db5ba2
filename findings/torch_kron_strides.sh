#!/usr/bin/env bash
# torch 2.14.1: torch.kron raises for a matrix whose strides are of another order, such as a transposed one.
#
# Guess before the run: `torch.kron(a, b.T)` is `torch.kron(a, b.T.contiguous())`.
# Seen: a RuntimeError about `view`, whichever of the two has such strides. ComfyUI (0.3.75) builds the second matrix of
# a LoKr with a core (`lokr_t2`) by an einsum whose result has them. It logs the error and leaves the weight unchanged,
# so such a layer of the LoRA does nothing.
#
# Installs pinned public packages into a temporary folder, runs them without this pack, and fails if that changes.
# PYTHON may name an interpreter that has torch 2.14.1; without one, it is installed too (3 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
if ! "$python" -c 'import torch; assert torch.__version__.startswith("2.14.1")' 2>/dev/null; then
    "$python" -m venv "$folder/venv"
    python="$folder/venv/bin/python"
    "$python" -m pip install --quiet torch==2.14.1 numpy
fi
"$python" - <<'PY'
import torch


def raises(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether torch.kron refuses them."""
    try:
        torch.kron(first, second)
    except RuntimeError as error:
        print(f"strides {first.stride()} and {second.stride()}: {error}")
        return True
    print(f"strides {first.stride()} and {second.stride()}: fine")
    return False


a, b = torch.randn(2, 3), torch.randn(4, 5)
core = torch.einsum("ijkl,jr,ip->prkl", torch.randn(2, 2, 3, 3), torch.randn(2, 5), torch.randn(2, 4))
seen = [raises(a, b), raises(a, b.T), raises(a.T, b), raises(a[:, :, None, None], core)]
expected = [False, True, True, True]
assert seen == expected, f"it has changed: {seen}"
PY
