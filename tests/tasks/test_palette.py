from sr4ir_dist.tasks.palette import voc_palette


def test_the_colours_are_those_of_the_voc_development_kit():
    palette = voc_palette()
    assert palette[:3] == [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
    assert palette[15] == (192, 128, 128)
    assert palette[20] == (0, 64, 128)
    assert palette[255] == (224, 224, 192)
    assert len(set(palette)) == 256
