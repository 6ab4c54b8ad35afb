"""tiltflow: score, train, serve and use reward models; tilt generators towards them."""

__version__ = "0.1.0"
