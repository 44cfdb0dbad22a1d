"""Measuring: contenders in turn, in processes of their own, against the limits of the machine."""
