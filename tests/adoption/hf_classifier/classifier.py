"""A Hugging Face classifier from a configuration; the tokenizer is a stand-in, so that nothing is downloaded."""

import torch
from lightning.pytorch import LightningModule
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForSequenceClassification, BertConfig


class TextClassifier(LightningModule):
    def __init__(self, hidden_size: int = 16, num_labels: int = 2, lr: float = 5e-4):
        super().__init__()
        self.save_hyperparameters()
        config = BertConfig(
            vocab_size=64, hidden_size=hidden_size, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16, num_labels=num_labels,
        )  # fmt: skip
        self.model = AutoModelForSequenceClassification.from_config(config)
        self.accuracy = MulticlassAccuracy(num_labels)

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        out = self.model(**batch)
        self.accuracy(out.logits, batch["labels"])
        self.log("val/loss", out.loss, sync_dist=True)
        self.log("val/accuracy", self.accuracy, on_epoch=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return {"logits": self.model(**batch).logits, "label": [f"class {i}" for i in self.model(**batch).logits.argmax(-1).tolist()]}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


class Reviews(torch.utils.data.Dataset):
    def __init__(self, split: str, size: int = 40):
        generator = torch.Generator().manual_seed(len(split))
        self.ids = torch.randint(1, 64, (size, 12), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids.sum() % 2).long()}
