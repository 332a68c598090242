"""A small GPT-2 under the Hugging Face Trainer: shuffled data, gradients accumulated, a schedule, dropout.

python before.py RUN [STEPS]           or: torchrun --nproc-per-node 2 before.py RUN [STEPS]
"""

import sys
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

TEXT = torch.frombuffer(bytearray(sys.modules["os"].__doc__ + TrainingArguments.__doc__, "utf8"), dtype=torch.uint8)


class Lines(Dataset):
    def __len__(self) -> int:
        return 392

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = TEXT[index * 16 : index * 16 + 32].long()
        return {"input_ids": tokens, "labels": tokens}


class PrintLoss(TrainerCallback):
    def on_log(self, args, state, control, logs, **_) -> None:
        if state.is_world_process_zero and "loss" in logs:
            print(f"step {state.global_step} loss {logs['loss']!r}", flush=True)


def main(url: str, total: int = 1000) -> None:
    set_seed(7)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=32, n_embd=32, n_layer=2, n_head=2))
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=total,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        warmup_steps=10,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Lines(), callbacks=[PrintLoss()])
    trainer.train()
    if torch.distributed.is_initialized():  # the Trainer leaves it open, and gloo's threads may then abort the exit
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
