"""Compute kernels: each folder holds one public function, its reference and its fast versions."""
