"""Other libraries' quantisers on fastvq's kernels: `patch` replaces them in a live model, `unpatch` restores them."""

from fastvq.interop.patching import PatchedModule, PatchReport, patch, unpatch

__all__ = ["PatchReport", "PatchedModule", "patch", "unpatch"]
