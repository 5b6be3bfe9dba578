"""Errors that a user can cause. Each message says what was expected, what was found, and what to do."""


class Ds4Error(Exception):
    """Base class of every error that a user of ds4jax can cause."""


class ConfigError(Ds4Error):
    """A configuration value is unknown, missing or contradicts another."""


class CheckpointError(Ds4Error):
    """A model file is not what it should be."""


class CapacityError(Ds4Error):
    """The model and its cache do not fit."""


class RequestError(Ds4Error):
    """A generation request cannot be carried out."""


class DeviceError(Ds4Error):
    """The machine lacks a device that was asked for."""
