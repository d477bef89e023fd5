"""BoxTeacher: instance segmentation learned from boxes (arXiv 2210.05174), in plain PyTorch."""
