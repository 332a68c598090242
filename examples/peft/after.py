"""LoRA on a frozen GPT-2: only the adapters are trained.

python after.py RUN [STEPS]
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import ckpt

TEXT = torch.frombuffer(bytearray(GPT2LMHeadModel.forward.__doc__, "utf8"), dtype=torch.uint8).long()


def main(url: str, total: int = 1000) -> None:
    torch.manual_seed(7)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=32, n_embd=32, n_layer=2, n_head=2))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    checkpointer = ckpt.Checkpointer(url, every=ckpt.Every(steps=20))
    adapters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {"adapters": adapters, "optim": optimizer, "rng": ckpt.Rng()}
    for step in checkpointer.steps(total, state):
        starts = torch.randint(len(TEXT) - 32, (4,))
        tokens = torch.stack([TEXT[start : start + 32] for start in starts])
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} loss {loss.item()!r}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
