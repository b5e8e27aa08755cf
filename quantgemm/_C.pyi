from typing import TypedDict

class FormatRow(TypedDict):
    name: str
    type_id: int
    block_elems: int
    block_bytes: int
    group: int
    has_offset: bool
    is_plain: bool
    can_quantize: bool

class RawBuildInfo(TypedDict):
    compiler: str
    cuda: str
    cuda_architectures: str
    torch_abi: str

def format_table() -> list[FormatRow]: ...
def build_info() -> RawBuildInfo: ...
