"""Projects as their authors write them, and the settings that make dlnb train each: nothing in them was changed for dlnb."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Project:
    name: str  # of the folder
    model: str
    data: str
    settings: dict[str, Any] = field(default_factory=dict)  # what a user has to say besides
    space: dict[str, Any] = field(default_factory=lambda: {"lr": [1e-3, 1e-2]})  # of a search
    changed: int = 0  # lines of the project that had to be changed
    refused: dict[str, str] = field(default_factory=dict)  # a strategy that cannot train it, and what is said
    instead: dict[str, str] = field(default_factory=dict)  # of a strategy: the one that plain Lightning needs as well
    predicts: bool = True
    needs: tuple[str, ...] = ()  # packages


def spec(target: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": target, **arguments}


ADAM = spec("torch.optim.Adam", _partial_=True, lr=1e-2, betas=[0.9, 0.99])
PLATEAU = spec("torch.optim.lr_scheduler.ReduceLROnPlateau", _partial_=True, patience=1)
NESTED = {"net": spec("lit.DenseNet", width=8, activation=spec("torch.nn.GELU")), "optimizer": ADAM, "scheduler": PLATEAU}
LINEAR = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 4, "out_features": 1}}
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01, "momentum": 0.9}}

PROJECTS = [
    Project("notebook", "mine.ipynb:Net", "mine.ipynb:Toy", space={"model_args.width": [4, 8]}),
    Project("exported", "core.ipynb:Net", "core.ipynb:Toy"),
    Project("nested", "lit.py:RegressionLitModule", "lit.py:Numbers",
            {"model_args": NESTED, "data_args": {"transform": spec("lit.Scale", factor=0.5)}, "monitor": "val/loss"},
            {"model_args.net.width": [4, 8], "model_args.optimizer.lr": {"low": 1e-3, "high": 1e-1, "log": True}, "model_args.optimizer.betas.0": [0.8, 0.9]}),
    Project("cli", "model.py:Regressor", "model.py:Points", {"model_args": {"backbone": LINEAR, "optimizer": SGD}},
            {"model_args.optimizer.lr": [1e-3, 1e-2]}, predicts=False),
    Project("gan", "gan.py:GAN", "gan.py:Ring", {"monitor": "val_d_loss"}, {"model_args.latent": [2, 4]},
            refused={"deepspeed_stage_3": "one optimizer"}, instead={"ddp": "ddp_find_unused_parameters_true"}),
    Project("detector", "detector.py:Detector", "detector.py:Boxes"),
    Project("loaders", "loaders.py:Net", "loaders.py:Domains", {"monitor": "val_loss/dataloader_idx_0"}),
    Project("stream", "stream.py:Net", "stream.py:Events", {"max_steps": 16}),
    Project("plateau", "net.py:Net", "net.py:Sums", space={"model_args.learning_rate": [0.01, 0.05]}),
    Project("hf_classifier", "classifier.py:TextClassifier", "classifier.py:Reviews", {"monitor": "val/loss"}, needs=("transformers",)),
    Project("hf_causal", "causal.py:CausalLM", "causal.py:Lines", {"collate_fn": "causal.py:pad"}, needs=("transformers",)),
    Project("lora", "lora.py:Adapted", "lora.py:Tokens", space={"model_args.rank": [1, 2]}, needs=("transformers", "peft")),
    Project("averaging", "net.py:Net", "net.py:Sums",
            {"callbacks": [{"class_path": "net.CountSteps", "init_args": {"every": 2}}, {"class_path": "dlnb.callbacks.averaging:WeightAveraging", "init_args": {"decay": 0.9}}]}, predicts=False),
    Project("gathered", "net.py:Embedder", "net.py:Items"),
    Project("compiled", "net.py:Net", "net.py:Sums", predicts=False),
    Project("metrics", "net.py:Net", "net.py:Signs", {"monitor": "val/acc", "monitor_mode": "max"}, predicts=False),
    Project("meta", "net.py:Net", "net.py:Sums"),
    Project("functions", "make.py:make_model", "make.py:make_data", {"model_args": {"width": 4}}, predicts=False),
    Project("segmenter", "net.py:Segmenter", "net.py:Discs"),
    Project("onecycle", "net.py:Net", "net.py:Module", {"gradient_clip_val": 1.0}, predicts=False),
]  # fmt: skip
