"""CLIP's vision tower with LoRA experts in every MLP (MoLE; MoVE-KD, arXiv 2501.01709), for transformers 5.

Parameter names are CLIP's, plus ``mlp.router``, ``mlp.moe_down.{e}.lora_{A,B}``, ``mlp.moe_up.{e}.lora_{A,B}``
(or ``mlp.moe_ffn.{e}.lora_{A,B}``) as in MoVE-KD's released adapter file.
"""

import torch
from torch import nn
from transformers import CLIPVisionModel
from transformers.activations import ACT2FN

from .configuration_mole_clip import MoleCLIPVisionConfig


class LoraExpert(nn.Module):
    """One low-rank map ``B(A(x))``; holds the parameters, `LoraExperts` computes."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.lora_A = nn.Linear(inputs, rank)
        self.lora_B = nn.Linear(rank, outputs)


class LoraExperts(nn.ModuleList):
    """All experts of one site as two matrix products: ranks side by side, masked by the gate."""

    def __init__(self, inputs: int, outputs: int, adapter: dict):
        super().__init__(LoraExpert(inputs, outputs, adapter["rank"]) for _ in range(adapter["experts"]))
        self.scale = adapter["alpha"] / adapter["rank"]
        self.dropout = adapter["dropout"]

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Maps x (..., inputs) with gate (..., experts) to (..., outputs)."""
        x = nn.functional.dropout(x, self.dropout, self.training)
        weight_a = torch.cat([expert.lora_A.weight for expert in self])
        bias_a = torch.cat([expert.lora_A.bias for expert in self])
        weight_b = torch.cat([expert.lora_B.weight for expert in self], dim=1)
        bias_b = torch.stack([expert.lora_B.bias for expert in self])
        gate = (gate * self.scale).to(x.dtype)
        hidden = nn.functional.linear(x, weight_a, bias_a).unflatten(-1, (len(self), -1))
        hidden = (hidden * gate.unsqueeze(-1)).flatten(-2)
        return nn.functional.linear(hidden, weight_b) + gate @ bias_b


class MoleCLIPMLP(nn.Module):
    """CLIP's MLP and its LoRA experts: one choice a token, made by a router on the MLP's input."""

    def __init__(self, config: MoleCLIPVisionConfig):
        super().__init__()
        width, hidden, adapter = config.hidden_size, config.intermediate_size, config.adapter
        self.config = config
        self.activation_fn = ACT2FN[config.hidden_act]
        self.dense = adapter["routing"] == "dense"
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.router = nn.Linear(width, adapter["experts"])
        if adapter["site"] == "ffn":
            self.moe_ffn = LoraExperts(width, width, adapter)
        else:
            self.moe_down = LoraExperts(width, hidden, adapter)
            self.moe_up = LoraExperts(hidden, width, adapter)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps (batch, tokens, width) to the same shape."""
        gate = self.router(hidden_states).softmax(dim=-1, dtype=torch.float32)
        if not self.dense:
            gate = nn.functional.one_hot(gate.argmax(dim=-1), gate.shape[-1])
        if hasattr(self, "moe_ffn"):
            output = self.fc2(self.activation_fn(self.fc1(hidden_states)))
            return output + self.moe_ffn(hidden_states, gate)
        inner = self.activation_fn(self.fc1(hidden_states) + self.moe_down(hidden_states, gate))
        return self.fc2(inner) + self.moe_up(inner, gate)


class MoleCLIPVisionModel(CLIPVisionModel):
    """`transformers.CLIPVisionModel` whose MLPs carry LoRA experts; same inputs, same outputs."""

    config_class = MoleCLIPVisionConfig
    config: MoleCLIPVisionConfig

    def __init__(self, config: MoleCLIPVisionConfig):
        super().__init__(config)
        for layer in self.encoder.layers:
            layer.mlp = MoleCLIPMLP(config)
        self.post_init()
