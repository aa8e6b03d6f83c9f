"""A GAN as in Lightning's documentation: manual optimization, two optimizers."""

import torch
from lightning.pytorch import LightningModule
from torch import nn


class GAN(LightningModule):
    def __init__(self, latent: int = 4, lr: float = 2e-4):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(latent, 16), nn.ReLU(), nn.Linear(16, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def forward(self, z):
        return self.generator(z)

    def loss(self, logits, real: bool):
        return nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))

    def training_step(self, batch, batch_idx):
        g, d = self.optimizers()
        z = torch.randn(len(batch), self.hparams.latent, device=self.device)
        self.toggle_optimizer(g)
        g_loss = self.loss(self.discriminator(self(z)), True)
        g.zero_grad()
        self.manual_backward(g_loss)
        g.step()
        self.untoggle_optimizer(g)
        self.toggle_optimizer(d)
        d_loss = (self.loss(self.discriminator(batch), True) + self.loss(self.discriminator(self(z).detach()), False)) / 2
        d.zero_grad()
        self.manual_backward(d_loss)
        d.step()
        self.untoggle_optimizer(d)
        self.log_dict({"g_loss": g_loss, "d_loss": d_loss}, prog_bar=True)

    def validation_step(self, batch, batch_idx):
        self.log("val_d_loss", self.loss(self.discriminator(batch), True), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_d_loss", self.loss(self.discriminator(batch), True), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return {"score": self.discriminator(batch)[:, 0], "point": batch}

    def configure_optimizers(self):
        betas = (0.5, 0.999)
        return [
            torch.optim.Adam(self.generator.parameters(), lr=self.hparams.lr, betas=betas),
            torch.optim.Adam(self.discriminator.parameters(), lr=self.hparams.lr, betas=betas),
        ]


class Ring(torch.utils.data.Dataset):
    def __init__(self, split):
        angle = torch.rand(48, generator=torch.Generator().manual_seed(len(split))) * 6.28
        self.points = torch.stack([angle.cos(), angle.sin()], dim=1)

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        return self.points[index]
