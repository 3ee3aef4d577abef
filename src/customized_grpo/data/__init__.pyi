from .examples import JsonlDataset as JsonlDataset
from .hub import HubDataset as HubDataset
from .load import load_datasets as load_datasets
from .settings import DataSettings as DataSettings
