"""One file a method, with calibration, Hessian and solver."""
