"""CLIP's vision tower with teacher-specific and general LoRA experts in every MLP (MoLA; HAWAII, arXiv 2506.19072).

For transformers 5. Parameter names are CLIP's, plus ``mlp.router_{teacher,general}.{0,2}`` and
``mlp.mola_{teacher,general}_{down,up}.{e}.lora_{A,B}`` (or ``mola_{teacher,general}_ffn``), and with DoRA
``lora_magnitude``, the magnitudes less the norms of the base's rows.
"""

import torch
from torch import nn
from transformers import CLIPVisionModel
from transformers.activations import ACT2FN

from .configuration_mola_clip import MolaCLIPVisionConfig

GROUPS = ("teacher", "general")


class LoraExpert(nn.Module):
    """One low-rank map ``B(A(x))``; holds the parameters, `MolaCLIPMLP` computes."""

    def __init__(self, inputs: int, outputs: int, rank: int, dora: bool):
        super().__init__()
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=False)
        if dora:
            self.lora_magnitude = nn.Parameter(torch.zeros(outputs))


class MolaCLIPMLP(nn.Module):
    """CLIP's MLP and its LoRA experts: one of each group a token, chosen by two routers on the MLP's input."""

    def __init__(self, config: MolaCLIPVisionConfig):
        super().__init__()
        width, hidden, adapter = config.hidden_size, config.intermediate_size, config.adapter
        self.config = config
        self.activation_fn = ACT2FN[config.hidden_act]
        self.scale, self.dropout = adapter["alpha"] / adapter["rank"], adapter["dropout"]
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        counts = {group: adapter[f"{group}_experts"] for group in GROUPS}
        self.groups = [group for group in GROUPS if counts[group]]
        sites = {"down": (width, hidden), "up": (hidden, width)}
        self.ffn = adapter["site"] == "ffn"
        if self.ffn:
            sites = {"ffn": (width, width)}
        for group in self.groups:
            inner = nn.Linear(width, adapter["router_width"])
            outer = nn.Linear(adapter["router_width"], counts[group])
            setattr(self, f"router_{group}", nn.Sequential(inner, nn.GELU(), outer))
            for site, (inputs, outputs) in sites.items():
                experts = [LoraExpert(inputs, outputs, adapter["rank"], adapter["dora"]) for _ in range(counts[group])]
                setattr(self, f"mola_{group}_{site}", nn.ModuleList(experts))

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the weight of every expert, the teachers' first, for x (..., width)."""
        gates = []
        for group in self.groups:
            probs = getattr(self, f"router_{group}")(x).softmax(dim=-1, dtype=torch.float32)
            gates.append(nn.functional.one_hot(probs.argmax(dim=-1), probs.shape[-1]))
        return torch.cat(gates, dim=-1).to(x.dtype)

    def added(self, site: str, x: torch.Tensor, gate: torch.Tensor, stretch: torch.Tensor | None) -> torch.Tensor:
        """Returns what the experts of a site add: two matrix products, ranks side by side, masked by the gate."""
        experts = [expert for group in self.groups for expert in getattr(self, f"mola_{group}_{site}")]
        weights = [expert.lora_B.weight for expert in experts]
        if stretch is not None:
            weights = [weight * one[:, None] for weight, one in zip(weights, 1 + stretch, strict=True)]
        x = nn.functional.dropout(x, self.dropout, self.training)
        hidden = nn.functional.linear(x, torch.cat([expert.lora_A.weight for expert in experts]))
        hidden = hidden.unflatten(-1, (len(experts), -1)) * (gate * self.scale).unsqueeze(-1)
        return nn.functional.linear(hidden.flatten(-2), torch.cat(weights, dim=1))

    def stretch(self, site: str, weight: torch.Tensor) -> torch.Tensor:
        """Returns DoRA's ``m_e / ||W + scale B_e A_e|| - 1`` (experts, outputs); the norm has no gradient."""
        experts = [expert for group in self.groups for expert in getattr(self, f"mola_{group}_{site}")]
        with torch.no_grad():
            a = torch.stack([expert.lora_A.weight for expert in experts]).float()
            b = torch.stack([expert.lora_B.weight for expert in experts]).float()
            base = weight.float().square().sum(dim=1)
            inner = 2 * torch.einsum("eri,oi->eor", a, weight.float())
            inner = inner + self.scale * b @ (a @ a.transpose(1, 2))
            norm = (base + self.scale * (b * inner).sum(dim=-1)).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        magnitude = torch.stack([expert.lora_magnitude for expert in experts]).float()
        return ((magnitude + (base.sqrt() - norm)) / norm).to(weight.dtype)

    def beside(self, site: str, x: torch.Tensor, linear: nn.Linear, gate: torch.Tensor) -> torch.Tensor:
        """Returns a linear's output with what the experts beside it add."""
        y, stretch = linear(x), None
        if self.config.adapter["dora"]:
            stretch = self.stretch(site, linear.weight)
            y = y + (gate @ stretch) * (y - linear.bias)
        return y + self.added(site, x, gate, stretch)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps (batch, tokens, width) to the same shape."""
        gate = self.gate(hidden_states)
        if self.ffn:
            output = self.fc2(self.activation_fn(self.fc1(hidden_states)))
            return output + self.added("ffn", hidden_states, gate, None)
        inner = self.activation_fn(self.beside("down", hidden_states, self.fc1, gate))
        return self.beside("up", inner, self.fc2, gate)


class MolaCLIPVisionModel(CLIPVisionModel):
    """`transformers.CLIPVisionModel` whose MLPs carry LoRA experts; same inputs, same outputs."""

    config_class = MolaCLIPVisionConfig
    config: MolaCLIPVisionConfig

    def __init__(self, config: MolaCLIPVisionConfig):
        super().__init__(config)
        for layer in self.encoder.layers:
            layer.mlp = MolaCLIPMLP(config)
        self.post_init()
