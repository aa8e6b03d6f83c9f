"""A causal model of Hugging Face in a LightningModule: whole, with adapters of peft over it, and with one written by hand."""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

SIZES = dict(vocab_size=4096, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)


def gpt2(**sizes) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**SIZES | sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


class Causal(LightningModule):
    def __init__(self, vocabulary: int = 4096):
        super().__init__()
        self.model = gpt2(vocab_size=vocabulary)

    def loss(self, batch):
        return self.model(input_ids=batch, labels=batch).loss

    def training_step(self, batch):
        if self.global_step == 3 and Path("break").exists():
            raise RuntimeError("interrupted on purpose")
        return self.loss(batch)

    def validation_step(self, batch):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch):
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch):
        return self.model(input_ids=batch).logits[:, -1].argmax(-1)


class Adapted(Causal):
    def __init__(self, rank: int = 2):
        super().__init__()
        lora = LoraConfig(r=rank, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        self.model = get_peft_model(self.model, lora)


class Bottleneck(Causal):
    "A frozen model of which one trained layer changes the embeddings."

    def __init__(self):
        super().__init__()
        self.model.requires_grad_(False)
        self.adapter = torch.nn.Linear(16, 16)

    def loss(self, batch):
        embedded = self.model.transformer.wte(batch)
        return self.model(inputs_embeds=embedded + self.adapter(embedded), labels=batch).loss


class Later(Causal):
    "The same model, made where a strategy can shard it as it is made."

    def __init__(self):
        LightningModule.__init__(self)
        self.model = None

    def configure_model(self):
        if self.model is None:
            self.model = gpt2()


class Tokens(torch.utils.data.Dataset):
    def __init__(self, split: str, size: int = 16):
        self.ids = torch.randint(1, 64, (size, 8), generator=torch.Generator().manual_seed(len(split)))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return self.ids[index]
