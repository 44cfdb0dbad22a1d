"""The engines that compute the operators: one file each, the same function names in each."""
