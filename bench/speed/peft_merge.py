"""The peer of peers.py: the merge with transformers and PEFT, as their documentation has a user do it.

python -m bench.speed.peft_merge CKPT ADAPTER OUT_DIR
"""

import os
import sys

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as bnb_dequantize.py: on a CPU it only costs them time
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    ckpt, adapter, out_dir = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(ckpt)
    model = model.dequantize()
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    # transformers 5.23 cannot save a model that was loaded quantized and then dequantized: save_pretrained
    # undoes the conversions that loading recorded, and for bitsandbytes' raises NotImplementedError. A user
    # has to clear them.
    merged._weight_conversions = None
    merged.save_pretrained(out_dir)


if __name__ == "__main__":
    main()
