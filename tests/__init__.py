"""Tests of megalite: unit/ mirrors the package, distributed/ runs gloo ranks, launch/ runs the real programs."""
