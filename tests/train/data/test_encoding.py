"""Images to codes."""

import torch

from tests.helpers import tiny_tokenizer
from train.data.encoding import encode_images
from train.data.images import to_float


def test_images_are_encoded_in_order_and_augmented_by_seed():
    tokenizer = tiny_tokenizer()
    images = torch.randint(256, (300, 1, 16, 16), dtype=torch.uint8)  # more than a batch
    codes = encode_images(tokenizer, images, [], 0)
    assert codes.dtype == torch.int32
    assert torch.equal(codes.long(), torch.cat([tokenizer.encode(to_float(x)) for x in images.split(256)]))
    shifted = [encode_images(tokenizer, images, ["shift"], seed) for seed in (1, 1, 2)]
    assert torch.equal(shifted[0], shifted[1])
    assert not torch.equal(shifted[0], shifted[2]) and not torch.equal(shifted[0], codes)
