"""snac: the quantiser of each stage, which is descript-audio-codec's."""

from __future__ import annotations

from fastvq.interop.dac import FastVectorQuantize
from fastvq.interop.patching import Client, by_path

CLIENTS = by_path([Client("snac.vq.VectorQuantize", FastVectorQuantize, ("67683b7aaf52c628",))])
