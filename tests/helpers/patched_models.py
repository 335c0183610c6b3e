"""What a patch of a model could leave behind."""


def snapshot(model):
    """Everything a patch could leave behind: processors, attributes, hooks."""
    return [
        (
            name,
            {key: id(value) for key, value in module.__dict__.items() if key[0] != "_"},
            {key: id(value) for key, value in module._modules.items()},
            # Hooks live in private attributes; their containers stay, their contents must not.
            {key: list(value) for key, value in vars(module).items() if key.endswith("_hooks")},
        )
        for name, module in model.named_modules()
    ]
