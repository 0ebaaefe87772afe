"""gptfast inside other libraries. Each module imports its library only inside its functions."""
