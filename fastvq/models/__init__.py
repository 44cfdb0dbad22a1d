"""The reference VQ-VAE of van den Oord et al. (2017), from its configuration to its images."""

from fastvq.models.config import CONFIGS, VQVAEConfig
from fastvq.models.fingerprint import fingerprint
from fastvq.models.vqvae import VQVAE, VQVAEOutput

__all__ = ["CONFIGS", "VQVAE", "VQVAEConfig", "VQVAEOutput", "fingerprint"]
