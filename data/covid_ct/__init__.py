"""The TFDS dataset `covid_ct`, in the folder layout of TFDS."""

from data.covid_ct.covid_ct_dataset_builder import Builder, Config

__all__ = ['Builder', 'Config']
