"""A genetic algorithm over the codes of an autoencoder whose latents are bits: `EvoLFQ`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvq.nn import checks
from fastvq.nn.lfq import LFQ

Fitness = Callable[[Tensor, Tensor], Any]  # decoded (P, ...) and bits (P, ...) to a fitness of each, (P,)


class Return(NamedTuple):
    """What `EvoLFQ` returns."""

    reconstructed: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class Result(NamedTuple):
    """A generation: the next population, and the best genes so far, with their fitness and what they decode to."""

    pop_bits: Tensor
    best_gene: Tensor
    best_fitness: float
    best_decoded: Tensor | None


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for all modules within, each put back after."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


class EvoLFQ(nn.Module):
    """An encoder, `LFQ` and a decoder; and the search for bits whose decoding is fittest.

    Takes the place of `vector_quantize_pytorch.EvoLFQ` 1.32.0: the same arguments, defaults, returns and state_dict,
    and, from the same seed, the same generations. Here `encode` reads the bits from the indices, so it is right with
    projections and rotations too, and `best_gene` has `best_fitness`.

    Args:
        encoder: gives latents (B, dim) or (B, N, dim).
        decoder: takes what `LFQ` gives.
        lfq: the quantiser; None makes one of dim, codebook_size, num_codebooks and lfq_kwargs.
        dim, codebook_size, num_codebooks: of `LFQ`.
        pop_size: individuals of a population.
        mutation_rate: probability that a bit is flipped.
        tournament_size: contenders for the place of a parent.
        elitism_count: fittest individuals that go on unchanged; fewer than pop_size.
        generations: of `evolve`.
        lfq_kwargs: further arguments of `LFQ`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, out of range, or that does not go with another.
    """

    zero: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        lfq: LFQ | None = None,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        num_codebooks: int = 1,
        pop_size: int = 64,
        mutation_rate: float = 0.02,
        tournament_size: int = 2,
        elitism_count: int = 1,
        generations: int = 50,
        **lfq_kwargs: Any,
    ) -> None:
        super().__init__()
        checks.whole("pop_size", pop_size, 1)
        checks.whole("tournament_size", tournament_size, 1)
        checks.whole("elitism_count", elitism_count, 0)
        checks.whole("generations", generations, 0)
        checks.number("mutation_rate", mutation_rate, 0.0, 1.0)
        if pop_size <= elitism_count:
            raise ValueError(f"pop_size must be more than elitism_count = {elitism_count}; got {pop_size}")
        self.encoder = encoder
        self.decoder = decoder
        if lfq is None:
            lfq = LFQ(dim=dim, codebook_size=codebook_size, num_codebooks=num_codebooks, **lfq_kwargs)
        self.lfq = lfq
        self.pop_size = pop_size
        self.mutation_rate = mutation_rate
        self.tournament_size = tournament_size
        self.elitism_count = elitism_count
        self.generations = generations
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where populations are made."""
        return self.zero.device

    def forward(self, x: Tensor, **kwargs: Any) -> Return:
        """Encode, quantise (with further arguments of `LFQ.forward`), decode."""
        quantized, indices, loss = self.lfq(self.encoder(x), **kwargs)
        return Return(self.decoder(quantized), indices, loss)

    @torch.no_grad()
    def encode(self, x: Tensor, return_signs: bool = False) -> Tensor:
        """The bits of x: (B, [N,] num_codebooks * d), 0 and 1, or -1 and 1 with return_signs; float32."""
        with _evaluating(self):
            indices = self.lfq(self.encoder(x)).indices
        if not self.lfq.keep_num_codebooks_dim:
            indices = indices.unsqueeze(-1)
        bits = (indices.unsqueeze(-1) & self.lfq.mask != 0).flatten(-2).float()
        return bits * 2 - 1 if return_signs else bits

    @torch.no_grad()
    def decode_bits(self, bits: Tensor) -> Tensor:
        """Decode bits (..., num_codebooks * d): 1 where they are positive, so 0 and 1, or -1 and 1, may be given."""
        width = self.lfq.num_codebooks * self.lfq.codebook_dim
        if bits.shape[-1] != width:
            raise ValueError(f"bits must have {width} in the last dimension; got {tuple(bits.shape)}")
        with _evaluating(self):
            parts = (bits > 0).unflatten(-1, (self.lfq.num_codebooks, self.lfq.codebook_dim))
            indices = (parts * self.lfq.mask).sum(-1)
            codes = self.lfq.indices_to_codes(indices if self.lfq.keep_num_codebooks_dim else indices.squeeze(-1))
            decoded: Tensor = self.decoder(codes)
        return decoded

    def init_random_population(
        self,
        pop_size: int | None = None,
        shape: tuple[int, ...] = (),
        device: torch.device | str | None = None,
        is_sign: bool = False,
    ) -> Tensor:
        """Even bits (pop_size, *shape), 0 and 1, or -1 and 1 with is_sign."""
        size = self.pop_size if pop_size is None else pop_size
        bits = torch.randint(0, 2, (size, *shape), device=self.device if device is None else device).float()
        return bits * 2 - 1 if is_sign else bits

    def init_population_from_data(
        self, x: Tensor, pop_size: int | None = None, mutation_rate: float | None = None, is_sign: bool = False
    ) -> Tensor:
        """The bits of x, repeated or cut to pop_size, and mutated."""
        size = self.pop_size if pop_size is None else pop_size
        rate = self.mutation_rate if mutation_rate is None else mutation_rate
        bits = self.encode(x, return_signs=is_sign)
        bits = bits.repeat(-(-size // bits.shape[0]), *[1] * (bits.dim() - 1))[:size]
        return self.mutate(bits, mutation_rate=rate, is_sign=is_sign) if rate > 0 else bits

    def uniform_crossover(self, parent1: Tensor, parent2: Tensor) -> Tensor:
        """Each bit from one of the two, at random."""
        return torch.where(torch.rand_like(parent1.float()) < 0.5, parent1, parent2)

    def mutate(self, population: Tensor, mutation_rate: float | None = None, is_sign: bool = False) -> Tensor:
        """Flip each bit with the probability mutation_rate."""
        rate = self.mutation_rate if mutation_rate is None else mutation_rate
        flipped = torch.rand_like(population.float()) < rate
        return torch.where(flipped, -population if is_sign else 1.0 - population, population)

    def tournament_selection(self, population: Tensor, fitnesses: Tensor, tournament_size: int | None = None) -> Tensor:
        """As many individuals as there are, each the fittest of tournament_size random ones."""
        size = self.tournament_size if tournament_size is None else tournament_size
        individuals = population.shape[0]
        contenders = torch.randint(0, individuals, (individuals, size), device=self.device)
        return population[_winners(contenders, fitnesses)]

    @torch.no_grad()
    def step(
        self,
        pop_bits: Tensor,
        fitness_fn: Fitness,
        tournament_size: int | None = None,
        mutation_rate: float | None = None,
        elitism_count: int | None = None,
        is_sign: bool = False,
        batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One generation.

        Args:
            pop_bits: (P, ..., bits).
            fitness_fn: decoded individuals and their bits to their fitness, (P,), a tensor or numbers.
            tournament_size, mutation_rate, elitism_count: the constructor's, where None.
            is_sign: bits are -1 and 1 rather than 0 and 1.
            batch_size: how many to decode at once; None means all.

        Returns:
            The next population, the elite first; and the fitness (P,) of this one.
        """
        contenders_each = self.tournament_size if tournament_size is None else tournament_size
        elite = self.elitism_count if elitism_count is None else elitism_count
        individuals = pop_bits.shape[0]
        chunks = [pop_bits] if batch_size is None else pop_bits.split(batch_size)
        fitnesses = fitness_fn(torch.cat([self.decode_bits(chunk) for chunk in chunks]), pop_bits)
        if not isinstance(fitnesses, Tensor):
            fitnesses = torch.tensor(fitnesses, device=self.device, dtype=torch.float32)
        elites = pop_bits[fitnesses.argsort(descending=True)[:elite]].clone()
        contenders = torch.randint(0, individuals, (individuals - elite, 2, contenders_each), device=self.device)
        first, second = pop_bits[_winners(contenders, fitnesses)].unbind(1)
        offspring = self.mutate(self.uniform_crossover(first, second), mutation_rate, is_sign)
        return torch.cat([elites, offspring]), fitnesses

    @torch.no_grad()
    def evolve(
        self,
        fitness_fn: Fitness,
        pop_bits: Tensor | None = None,
        pop_size: int | None = None,
        shape: tuple[int, ...] | None = None,
        generations: int | None = None,
        is_sign: bool = False,
        return_best_decoded: bool = False,
        **step_kwargs: Any,
    ) -> Iterator[Result]:
        """Generation after generation.

        Args:
            fitness_fn: as in `step`.
            pop_bits: the first population; None makes pop_size random ones of the given shape.
            pop_size, generations: the constructor's, where None.
            shape: of an individual's bits.
            is_sign: bits are -1 and 1 rather than 0 and 1.
            return_best_decoded: decode the best genes.
            step_kwargs: further arguments of `step`.

        Yields:
            A `Result` for each generation.

        Raises:
            ValueError: neither pop_bits nor shape is given.
        """
        if pop_bits is None:
            if shape is None:
                raise ValueError("pop_bits or shape must be given; got neither")
            pop_bits = self.init_random_population(pop_size, shape, is_sign=is_sign)
        best_fitness, best_gene = float("-inf"), pop_bits[0]
        for _ in range(self.generations if generations is None else generations):
            population = pop_bits
            pop_bits, fitnesses = self.step(population, fitness_fn, is_sign=is_sign, **step_kwargs)
            fittest = fitnesses.argmax()
            if float(fitnesses[fittest]) > best_fitness:
                best_fitness, best_gene = float(fitnesses[fittest]), population[fittest].clone()
            best_decoded = self.decode_bits(best_gene.unsqueeze(0)).squeeze(0) if return_best_decoded else None
            yield Result(pop_bits, best_gene, best_fitness, best_decoded)


def _winners(contenders: Tensor, fitnesses: Tensor) -> Tensor:
    """Of the numbers of individuals (..., T), the fittest one's, (...)."""
    return contenders.gather(-1, fitnesses[contenders].argmax(-1, keepdim=True)).squeeze(-1)
