"""The toy world: coloured shapes with Chinese captions, several styles, and a judge that reads them back."""
