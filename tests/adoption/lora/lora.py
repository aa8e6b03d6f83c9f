"""LoRA adapters of peft over a frozen causal model."""

import torch
from lightning.pytorch import LightningModule
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config


class Adapted(LightningModule):
    def __init__(self, rank: int = 2, lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        base = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))
        self.model = get_peft_model(base, LoraConfig(r=rank, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"))

    def loss(self, batch):
        return self.model(input_ids=batch, labels=batch).loss

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self.model(input_ids=batch).logits[:, -1].argmax(-1)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.hparams.lr)


class Tokens(torch.utils.data.Dataset):
    def __init__(self, split: str, size: int = 40):
        self.ids = torch.randint(1, 64, (size, 8), generator=torch.Generator().manual_seed(len(split)))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return self.ids[index]
