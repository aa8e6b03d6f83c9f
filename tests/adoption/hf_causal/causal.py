"""A Hugging Face causal language model, with tied weights and a collator that pads."""

import torch
from lightning.pytorch import LightningModule
from transformers import AutoModelForCausalLM, GPT2Config


class CausalLM(LightningModule):
    def __init__(self, n_embd: int = 16, lr: float = 1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_positions=16, n_embd=n_embd, n_layer=1, n_head=2))

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch).loss, sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.model(**batch).loss, sync_dist=True)

    def predict_step(self, batch, batch_idx):
        prompt = batch["input_ids"][:, :2]
        return {
            "text": [
                " ".join(map(str, ids)) for ids in self.model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0).tolist()
            ]
        }


class Lines(torch.utils.data.Dataset):
    def __init__(self, split: str, size: int = 40):
        generator = torch.Generator().manual_seed(len(split))
        self.lines = [torch.randint(1, 64, (4 + index % 8,), generator=generator) for index in range(size)]
        self.lengths = [len(line) for line in self.lines]

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, index):
        return self.lines[index]


def pad(lines):
    ids = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}
