/*
 * Page checksums of PostgreSQL, in C: the hot loop of every backup that reads pages in full.
 *
 * The algorithm is that of PostgreSQL's storage/checksum_impl.h: 32 lanes of an FNV-1a variant,
 * each mixed with one 32-bit word in every 128 bytes of the page, two rounds of zeroes, an XOR
 * over the lanes, then the block number. dbmodule/page.py holds the twin in numpy.
 *
 * Only the limited API is used, so one binary serves CPython 3.11 and later. Pages may lie at any
 * address, and nothing is written but the result. The loop runs without the GIL.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "pages are read as little-endian words; the numpy twin serves other machines"
#endif

/* Both forms of the loop in one binary, chosen when it is loaded; needs ifunc, so glibc. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define FOR_EACH_TARGET __attribute__((target_clones("avx2", "default")))
#endif
#endif
#ifndef FOR_EACH_TARGET
#define FOR_EACH_TARGET
#endif

#define PAGE_BYTES 8192
#define LANES 32
#define PRIME 16777619u
#define CHECKSUM_WORD 2

static const uint32_t seeds[LANES] = {
    0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C,
    0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB,
    0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4,
    0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756,
};

/*
 * One step of one lane. The loops over lanes have a fixed count and read their words straight from
 * the page, so that compilers keep all lanes in vector registers; a copy of the words on the stack
 * costs three quarters of the speed.
 */
#define MIX(sum, word)                              \
    do {                                            \
        uint32_t mixed = (sum) ^ (word);            \
        (sum) = (mixed * PRIME) ^ (mixed >> 17);    \
    } while (0)

static inline uint32_t
load_word(const unsigned char *at)
{
    uint32_t word;

    memcpy(&word, at, sizeof word);
    return word;
}

FOR_EACH_TARGET
static void
checksum_pages(const unsigned char *pages, size_t count, const unsigned char *blocks,
               unsigned char *out)
{
    for (size_t page = 0; page < count; page++, pages += PAGE_BYTES) {
        uint32_t sums[LANES];
        uint32_t folded = 0;
        uint16_t checksum;

        memcpy(sums, seeds, sizeof sums);
        /* Cancels the stored checksum, which the first round is going to mix in. */
        sums[CHECKSUM_WORD] ^= load_word(pages + 4 * CHECKSUM_WORD) & 0xFFFFu;
        for (size_t row = 0; row < PAGE_BYTES; row += 4 * LANES)
            for (size_t lane = 0; lane < LANES; lane++)
                MIX(sums[lane], load_word(pages + row + 4 * lane));
        for (int round = 0; round < 2; round++)
            for (size_t lane = 0; lane < LANES; lane++)
                MIX(sums[lane], 0u);
        for (size_t lane = 0; lane < LANES; lane++)
            folded ^= sums[lane];
        checksum = (uint16_t)((folded ^ load_word(blocks + 4 * page)) % 65535 + 1);
        memcpy(out + page * sizeof checksum, &checksum, sizeof checksum);
    }
}

static PyObject *
page_checksums(PyObject *module, PyObject *args)
{
    Py_buffer pages, blocks, out;
    PyObject *result = NULL;

    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*w*:page_checksums", &pages, &blocks, &out))
        return NULL;
    if (pages.len % PAGE_BYTES != 0 || blocks.len != pages.len / PAGE_BYTES * 4 ||
        out.len != pages.len / PAGE_BYTES * 2) {
        PyErr_SetString(PyExc_ValueError, "each whole page needs a 32-bit block number and a "
                                          "16-bit element of the result");
    } else {
        Py_BEGIN_ALLOW_THREADS
        checksum_pages(pages.buf, (size_t)(pages.len / PAGE_BYTES), blocks.buf, out.buf);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&pages);
    PyBuffer_Release(&blocks);
    PyBuffer_Release(&out);
    return result;
}

static PyMethodDef methods[] = {
    {"page_checksums", page_checksums, METH_VARARGS,
     "page_checksums(pages, blocks, out)\n--\n\n"
     "Write the checksum of each 8 kB page to out, a buffer of 16-bit elements; blocks holds the\n"
     "pages' block numbers, 32 bits each."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_kernel", "Page checksums in C; see dbmodule.kernel.", 0, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC
PyInit__kernel(void)
{
    return PyModuleDef_Init(&module);
}
