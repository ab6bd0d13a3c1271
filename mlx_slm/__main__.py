"""`python -m mlx_slm` is `mlx-slm`."""

from mlx_slm.cli import main

if __name__ == "__main__":
    main()
