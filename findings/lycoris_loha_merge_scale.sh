#!/usr/bin/env bash
# lycoris-lora 4.1.3: a LoHa that is merged is not the LoHa that was trained.
#
# Guess before the run: merging a module into its layer (`merge_to`, `get_merged_weight`) adds what the module adds in
# its forward pass, as it does for LoCon.
# Seen: for LoHa the merge adds alpha / rank times that. The scale is in the product of the factors already, and the
# merge multiplies by it once more. With alpha 1 and rank 4 a merged LoHa has a quarter of its strength; with alpha equal
# to rank nothing shows. The saved file is right: ComfyUI 0.3.75 and this pack read it at the strength of the training.
#
# Installs pinned public packages into a temporary folder, runs them without this pack, and fails if that changes.
# PYTHON may name an interpreter that has torch; without one, torch 2.14.1 is installed too (3 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
if ! "$python" -c 'import torch' 2>/dev/null; then
    "$python" -m venv "$folder/venv"
    python="$folder/venv/bin/python"
    "$python" -m pip install --quiet torch==2.14.1 numpy
fi
"$python" -m pip install --quiet --no-deps --target "$folder/packages" lycoris-lora==4.1.3 toml==0.10.2
PYTHONPATH="$folder/packages" "$python" - <<'PY'
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule


def ratio(kind: type, alpha: float) -> float:
    """What a merge adds to a layer, by what the module adds in its forward pass; rank 4."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64, bias=False)
    plain = layer.weight.detach().clone()
    module = kind("module", layer, multiplier=1.0, lora_dim=4, alpha=alpha)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    module.apply_to()
    with torch.no_grad():
        trained = layer(torch.eye(64)).T - plain
        module.restore()
        module.merge_to(1.0)
    merged = layer.weight.detach() - plain
    assert torch.allclose(merged / merged.norm(), trained / trained.norm(), atol=1e-4), "another direction"
    return float(merged.norm() / trained.norm())


seen = {(kind.__name__, alpha): round(ratio(kind, alpha), 3) for kind in (LoConModule, LohaModule) for alpha in (1.0, 4.0)}
for (name, alpha), share in seen.items():
    print(f"{name}, alpha {alpha:g}, rank 4: merged / trained = {share}")
expected = {("LoConModule", 1.0): 1.0, ("LoConModule", 4.0): 1.0, ("LohaModule", 1.0): 0.25, ("LohaModule", 4.0): 1.0}
assert seen == expected, f"it has changed: {seen}"
PY
