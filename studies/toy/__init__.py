"""How the toy's models were trained, and the study that was made with them."""
