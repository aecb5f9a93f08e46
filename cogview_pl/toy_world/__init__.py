"""The toy world: coloured shapes with Chinese captions in several styles, and a judge that detects them."""
