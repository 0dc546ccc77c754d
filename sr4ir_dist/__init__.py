"""SR4IR on Ray, DeepSpeed and Arrow shards: super-resolution trained for image recognition.

The method is that of "Beyond Image Super-Resolution for Image Recognition with Task-Driven
Perceptual Loss" (CVPR 2024). Start reading at `recipes` (the paper as data), then
`training/loop.py` and `training/step.py`.
"""

__version__ = "0.1.0"
