#!/usr/bin/env bash
# diffusers 0.42.1: a LoRA that is converted to kohya's names loses the ratio of its alpha to its rank.
#
# Guess before the run: `convert_state_dict_to_kohya` writes alphas such that the LoRA acts as it did, or refuses without
# them.
# Seen: it writes the rank as every alpha, whatever was trained. An adapter of rank 4 with lora_alpha 1 acts four times as
# strongly after the conversion, one with lora_alpha 8 half as strongly. What diffusers saves has no alpha among its
# tensors either: it is only in the file's metadata (`lora_adapter_metadata`), which the two functions never see that its
# training scripts call for the conversion.
#
# Installs pinned public packages into a temporary folder, runs them without this pack, and fails if that changes.
# PYTHON may name an interpreter that has them; without one, they are installed too (3 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
check='import diffusers, peft; assert (diffusers.__version__, peft.__version__) == ("0.42.1", "0.21.2")'
if ! "$python" -c "$check" 2>/dev/null; then
    "$python" -m venv "$folder/venv"
    python="$folder/venv/bin/python"
    "$python" -m pip install --quiet torch==2.14.1 numpy diffusers==0.42.1 peft==0.21.2 transformers==5.24.0
fi
HF_HUB_OFFLINE=1 FOLDER=$folder "$python" - <<'PY'
import json
import os

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

RANK = 4


def scales(alpha: int) -> tuple[float, float, float]:
    """The factor of a LoRA's change as it is trained, as its file's metadata says, and in kohya's names."""
    unet = UNet2DConditionModel(
        block_out_channels=(32,), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )
    config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["to_k", "to_v"])
    unet.add_adapter(config)
    trained = {m.scaling["default"] for m in unet.modules() if hasattr(m, "lora_A") and "default" in m.scaling}
    target = os.path.join(os.environ["FOLDER"], f"alpha_{alpha}")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(
        target, unet_lora_layers=layers, unet_lora_adapter_metadata=config.to_dict()
    )
    path = os.path.join(target, "pytorch_lora_weights.safetensors")
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
        assert not [name for name in file.keys() if name.endswith("alpha")]
    kohya = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(load_file(path)))
    written = {float(value) / RANK for name, value in kohya.items() if name.endswith(".alpha")}
    assert len(trained) == len(written) == 1
    return trained.pop(), said["unet.lora_alpha"] / said["unet.r"], written.pop()


for alpha, expected in ((4, (1.0, 1.0, 1.0)), (1, (0.25, 0.25, 1.0)), (8, (2.0, 2.0, 1.0))):
    seen = scales(alpha)
    print(f"rank {RANK}, lora_alpha {alpha}: trained {seen[0]}, in the metadata {seen[1]}, converted {seen[2]}")
    assert seen == expected, f"it has changed: {seen}"
PY
