"""Motion priors: what one is, how it is read and selected, where it is kept, and the one maker of them."""
