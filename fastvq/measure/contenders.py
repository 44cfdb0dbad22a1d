"""What is timed: fastvq and its rivals, each as well as we could write or call it, doing the same work."""

from __future__ import annotations

from collections.abc import Callable
from importlib import util
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import fastvq
from fastvq.backends import cpu
from fastvq.measure.data import Shape, draw
from fastvq.measure.timing import Work

DECAY, EPS = 0.99, 1e-5
PACKAGES = {"faiss": "faiss", "peer": "vector_quantize_pytorch"}  # the contenders that need one


def available(contenders: tuple[str, ...]) -> tuple[str, ...]:
    """Those that can run here: all but those whose package is not installed."""
    return tuple(name for name in contenders if name not in PACKAGES or util.find_spec(PACKAGES[name]))


# ---- search -----------------------------------------------------------------------------------------------------

SEARCHES = ("fastvq", "naive", "chunked", "faiss", "peer")


def naive_search(x: Tensor, codebook: Tensor) -> Tensor:
    """The distance matrix (N, K) and its argmin, as most VQ-VAE code has it."""
    distances = x.square().sum(1, keepdim=True) - 2 * x @ codebook.t() + codebook.square().sum(1)
    return distances.argmin(1)


def chunked_search(x: Tensor, codebook: Tensor) -> Tensor:
    """The best plain PyTorch: scores of some rows at a time in one scratch block, no ||x||^2, no N x K."""
    rows = min(x.shape[0], max(128, min(1024, (1 << 24) // codebook.shape[0])))  # the fastest of 32 to 1024 here
    bias, codes = codebook.square().sum(1).mul_(-0.5), codebook.t()
    scratch = x.new_empty(rows, codebook.shape[0])
    indices = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    for start in range(0, x.shape[0], rows):
        block = x[start : start + rows]
        scores = torch.addmm(bias, block, codes, out=scratch[: block.shape[0]])
        torch.argmax(scores, 1, out=indices[start : start + rows])
    return indices


def _faiss_search(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    """faiss's exact index of the codes, built outside the time, on as many threads as torch has."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    rows = x.numpy()
    return lambda: torch.from_numpy(index.search(rows, 1)[1][:, 0])


def _holding(layer: Any, codes: Tensor) -> Any:
    """A layer of the peer's or of ours with `codes` as its codebook, its averages as if each code had one row."""
    layer._codebook.embed.copy_(codes)
    layer._codebook.embed_avg.copy_(codes)
    layer._codebook.cluster_size.fill_(1)
    return layer


def _peer(codebook: Tensor, **settings: Any) -> Any:
    """vector-quantize-pytorch with our codes; straight-through, as the others, not its rotation trick."""
    from vector_quantize_pytorch import VectorQuantize

    k, d = codebook.shape
    return _holding(VectorQuantize(d, k, decay=DECAY, eps=EPS, rotation_trick=False, **settings), codebook)


def _module(codebook: Tensor, **settings: Any) -> Any:
    """fastvq's layer, with the same arguments."""
    k, d = codebook.shape
    return _holding(fastvq.VectorQuantize(d, k, decay=DECAY, eps=EPS, rotation_trick=False, **settings), codebook)


def _peer_search(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    """The peer has no search by itself: its forward in evaluation comes nearest."""
    layer, batch = _peer(codebook).eval(), x.unsqueeze(0)
    return torch.no_grad()(lambda: layer(batch)[1].squeeze(0))


def search_work(contender: str, shape: Shape, family: str = "gaussian", changed: bool = True) -> Work:
    """One search of N rows, which returns their indices (N,).

    Args:
        contender: one of `SEARCHES`.
        shape: N, K, D.
        family: the data, a key of `data.FAMILIES`.
        changed: every code changes before each call, as in training, so that nothing made from the codes is of use
            again; faiss and the peer keep theirs.
    """
    x, codebook = draw(shape, family)
    makers: dict[str, Callable[[Tensor, Tensor], Callable[[], Any]]] = {
        "fastvq": lambda x, codes: lambda: fastvq.search(x, codes),
        "naive": lambda x, codes: lambda: naive_search(x, codes),
        "chunked": lambda x, codes: lambda: chunked_search(x, codes),
        "faiss": _faiss_search,
        "peer": _peer_search,
    }
    call = makers[contender](x, codebook)
    return Work(call, _changing(codebook)) if changed else Work(call)


def _changing(codebook: Tensor) -> Callable[[], object]:
    """Makes every code another, back and forth, by a part in a million."""
    versions = [codebook * (1 + 1e-6), codebook.clone()]

    def change() -> None:
        codebook.copy_(versions[0])
        versions.reverse()

    return change


# ---- the machine's limits ---------------------------------------------------------------------------------------

UNITS = ("float32", "int8")
_PEAK_ROUNDS = 1 << 20


def peak_work(unit: str) -> Work:
    """Some milliseconds of nothing but multiply-adds in registers, "float32", or dot products, "int8"."""
    loop = getattr(cpu.extension(), f"{unit}_operations")
    return Work(lambda: loop(_PEAK_ROUNDS, torch.get_num_threads()))


def peak_operations(unit: str, threads: int) -> float:
    """Operations of one call of `peak_work`; 0 where the machine or the build has no such instruction."""
    return 0.0 if cpu.missing() else _PEAK_ROUNDS * getattr(cpu.extension(), f"{unit}_operations")(1, 1) * threads


_COPIED = 1 << 24  # numbers of four bytes: more than caches hold


def copy_work() -> Work:
    """A copy of 64 MiB by torch."""
    source = torch.ones(_COPIED)
    target = torch.empty_like(source)
    return Work(lambda: target.copy_(source))


COPY_BYTES = 2 * 4 * _COPIED  # that `copy_work` reads and writes

# ---- training step ----------------------------------------------------------------------------------------------

STEPS = ("fastvq", "module", "naive", "chunked", "peer")
OPERATORS = ("vector_quantize", "ema_step_", "backward")  # of fastvq's step, one after another


class Layer(Protocol):
    """A VQ layer in training."""

    def reset(self, codebook: Tensor) -> None:
        """Start from these codes (K, D), as if each had one row."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise (N, D), update the codebook; quantized (N, D) and the commitment loss."""


class _State:
    """A VQ layer's state in plain tensors: the codebook and its moving averages."""

    def __init__(self, codebook: Tensor) -> None:
        self.reset(codebook)

    def reset(self, codebook: Tensor) -> None:
        """Start from these codes, as if each had one row."""
        self.codebook = codebook.clone()
        self.cluster_size = codebook.new_ones(codebook.shape[0])
        self.embed_avg = codebook.clone()

    def refresh(self, counts: Tensor, sums: Tensor) -> None:
        """The EMA update, as plain PyTorch."""
        self.cluster_size.mul_(DECAY).add_(counts, alpha=1 - DECAY)
        self.embed_avg.mul_(DECAY).add_(sums, alpha=1 - DECAY)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + EPS) / (total + self.cluster_size.shape[0] * EPS) * total
        torch.div(self.embed_avg, smoothed.unsqueeze(1), out=self.codebook)


class FusedLayer(_State):
    """fastvq's functions."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise (N, D), update the codebook; quantized (N, D) and the commitment loss."""
        quantized, indices, loss = self.quantize(x)
        self.learn(x, indices)
        return quantized, loss

    def quantize(self, x: Tensor) -> tuple[Tensor, ...]:
        """Quantized (N, D), indices (N,) and the loss."""
        return fastvq.vector_quantize(x, self.codebook)

    def learn(self, x: Tensor, indices: Tensor) -> None:
        """Update the averages and the codebook."""
        fresh = torch.empty_like(self.codebook)  # the backward pass needs the codes of this forward pass
        fastvq.ema_step_(fresh, self.cluster_size, self.embed_avg, x, indices, decay=DECAY, eps=EPS)
        self.codebook = fresh


class NaiveLayer(_State):
    """The usual way: one-hot matrix (N, K), one matmul to gather and one to sum."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise (N, D), update the codebook; quantized (N, D) and the commitment loss."""
        with torch.no_grad():
            indices = naive_search(x, self.codebook)
            one_hot = x.new_zeros(x.shape[0], self.codebook.shape[0]).scatter_(1, indices.unsqueeze(1), 1)
            codes = one_hot @ self.codebook
            self.refresh(one_hot.sum(0), one_hot.t() @ x)
        loss = nn.functional.mse_loss(x, codes)
        return x + (codes - x).detach(), loss


class ChunkedLayer(_State):
    """The best plain PyTorch: search in chunks, gather by index_select, sum by index_add_."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise (N, D), update the codebook; quantized (N, D) and the commitment loss."""
        with torch.no_grad():
            indices = chunked_search(x, self.codebook)
            codes = self.codebook.index_select(0, indices)
            counts = torch.bincount(indices, minlength=self.codebook.shape[0])
            self.refresh(counts, torch.zeros_like(self.codebook).index_add_(0, indices, x))
        loss = nn.functional.mse_loss(x, codes)
        return x + (codes - x).detach(), loss


class ModuleLayer:
    """A whole module in training: fastvq's or the peer's."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.train()

    def reset(self, codebook: Tensor) -> None:
        """Start from these codes, as if each had one row."""
        _holding(self.module, codebook)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise (N, D), update the codebook; quantized (N, D) and the commitment loss."""
        quantized, _, loss = self.module(x.unsqueeze(0))
        return quantized.squeeze(0), loss


LAYERS: dict[str, Callable[[Tensor], Layer]] = {
    "fastvq": FusedLayer,
    "module": lambda codebook: ModuleLayer(_module(codebook)),
    "naive": NaiveLayer,
    "chunked": ChunkedLayer,
    "peer": lambda codebook: ModuleLayer(_peer(codebook)),
}


def step_work(contender: str, shape: Shape) -> Work:
    """One training step of the layer: forward, EMA update, backward to x; `contender` is one of `STEPS`.

    Each step is the first from new codes: the data do not depend on how many steps a contender has time for.
    """
    x, codebook = draw(shape)
    upstream = torch.full_like(x, 1e-3)
    layer = LAYERS[contender](codebook)

    def step() -> Tensor:
        leaf = x.detach().requires_grad_()
        return _gradient(leaf, *layer(leaf), upstream)

    return Work(step, lambda: _begin(layer, codebook))


def _begin(layer: Layer, codebook: Tensor) -> None:
    """Start from codes that were never there before: nothing made from earlier ones is of use."""
    codebook.mul_(1 + 1e-6)
    layer.reset(codebook)


def _gradient(leaf: Tensor, quantized: Tensor, loss: Tensor, upstream: Tensor) -> Tensor:
    """To the rows, from `upstream` to what they became, and 1 to the loss."""
    (grad,) = torch.autograd.grad([quantized, loss], [leaf], [upstream, torch.ones_like(loss)])
    return grad


def operator_work(operator: str, shape: Shape) -> Work:
    """One operator of fastvq's training step, with the caches as those before it in the step have left them.

    Args:
        operator: one of `OPERATORS`, or "search", which `vector_quantize` contains.
        shape: N, K, D.
    """
    x, codebook = draw(shape)
    upstream = torch.full_like(x, 1e-3)
    layer = FusedLayer(codebook)
    found: dict[str, Any] = {}

    def backward() -> Tensor:
        leaf, (quantized, _, loss) = found["leaf"], found["vector_quantize"]
        return _gradient(leaf, quantized, loss, upstream)

    calls: dict[str, Callable[[], Any]] = {
        "search": lambda: fastvq.search(x, layer.codebook),
        "vector_quantize": lambda: layer.quantize(found["leaf"]),
        "ema_step_": lambda: layer.learn(found["leaf"], found["vector_quantize"][1]),
        "backward": backward,
    }

    def before() -> None:
        found.clear()
        _begin(layer, codebook)
        found["leaf"] = x.detach().requires_grad_()
        for name in () if operator == "search" else OPERATORS[: OPERATORS.index(operator)]:
            found[name] = calls[name]()

    return Work(calls[operator], before)


def operator_bytes(shape: Shape) -> dict[str, int]:
    """What the operators that do no search must read and write, each tensor once."""
    n, k, d = shape
    return {
        "ema_step_": 4 * n * d + 8 * n + 4 * k * (4 * d + 4),
        "backward": 4 * 3 * n * d + 8 * n + 4 * k * d,
    }


# ---- residual quantisation --------------------------------------------------------------------------------------

RESIDUALS = ("fastvq", "naive", "chunked", "peer")


def residual_work(contender: str, batch: tuple[int, ...], stages: int, shape: Shape) -> Work:
    """All stages of a residual quantiser in evaluation; `contender` is one of `RESIDUALS`.

    Args:
        contender: one of `RESIDUALS`.
        batch: leading sizes of x (..., D), N rows in all.
        stages: Q, codebooks in a row, each as much finer as the residual it is for.
        shape: N, K, D.
    """
    n, k, d = shape
    x, codes = draw((n, stages * k, d))
    x = x.reshape(*batch, d)
    codebooks = codes.reshape(stages, k, d) * 0.9 ** torch.arange(stages).reshape(-1, 1, 1)
    if contender == "fastvq":
        return Work(lambda: fastvq.residual_quantize(x, codebooks))
    if contender == "peer":
        from vector_quantize_pytorch import ResidualVQ

        peer = ResidualVQ(dim=d, num_quantizers=stages, codebook_size=k).eval()
        for layer, codebook in zip(peer.layers, codebooks, strict=True):
            _holding(layer, codebook)
        return Work(torch.no_grad()(lambda: peer(x)))
    search = {"naive": naive_search, "chunked": chunked_search}[contender]

    def plain() -> tuple[Tensor, Tensor]:
        residual, indices = x.reshape(-1, d), []
        for codebook in codebooks:
            indices.append(search(residual, codebook))
            residual = residual - codebook[indices[-1]]
        return x - residual.reshape(x.shape), torch.stack(indices, -1).reshape(*batch, stages)

    return Work(plain)


# ---- a model with the layer in it -------------------------------------------------------------------------------

MODELS = ("fastvq", "none", "layer", "naive", "peer")


def model_work(contender: str, images: int, side: int, shape: Shape) -> Work:
    """Forward and backward of a small convolutional autoencoder with the layer between its halves.

    Args:
        contender: whose layer: "fastvq" (the module), "naive", "peer", or "none"; or "layer", fastvq's by itself on
            latents that are there, forward and backward.
        images: how many there are in a batch.
        side: pixels, a multiple of 4; four times that of the latents.
        shape: N = images * (side / 4)^2 latents, K, D.
    """
    latents, codebook = draw(shape)
    d = shape[2]
    x = torch.rand(images, 3, side, side, generator=torch.Generator().manual_seed(2))
    latents = latents.reshape(images, side // 4, side // 4, d).permute(0, 3, 1, 2).contiguous()
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, d, 4, 2, 1), nn.ReLU(), nn.Conv2d(d, d, 4, 2, 1))
    decoder = nn.Sequential(nn.ConvTranspose2d(d, d, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(d, 3, 4, 2, 1))
    naive = NaiveLayer(codebook)

    def naive_image(z: Tensor) -> tuple[Tensor, Tensor]:
        quantized, loss = naive(z.permute(0, 2, 3, 1).reshape(-1, d))
        return quantized.reshape(images, side // 4, side // 4, d).permute(0, 3, 1, 2), loss

    makers: dict[str, Callable[[], Any]] = {
        "fastvq": lambda: _module(codebook, accept_image_fmap=True).train(),
        "peer": lambda: _peer(codebook, accept_image_fmap=True).train(),
        "naive": lambda: naive_image,
        "none": lambda: lambda z: (z, z.new_zeros(())),
    }
    layer = makers["fastvq" if contender == "layer" else contender]()
    parameters = [*encoder.parameters(), *decoder.parameters()]

    def step() -> tuple[Tensor, ...]:
        quantized, *_, loss = layer(encoder(x))
        error = nn.functional.mse_loss(decoder(quantized), x) + loss
        return torch.autograd.grad(error, parameters)

    def alone() -> tuple[Tensor, ...]:
        leaf = latents.detach().requires_grad_()
        quantized, *_, loss = layer(leaf)
        return torch.autograd.grad([quantized, loss], [leaf], [leaf.detach(), torch.ones_like(loss)])

    return Work(alone if contender == "layer" else step)
