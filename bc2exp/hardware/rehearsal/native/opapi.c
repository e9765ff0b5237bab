/* The one aclnn operator torch_npu calls without going through PyTorch's dispatcher:
 * its HCCL all_gather pads odd-sized tensors to 32 bytes with aclnnConstantPadNd.
 * Every other aclnn operator is absent on purpose; torch_npu then raises "aclnnX ... not in libopapi.so".
 */
#include "rehearsal.h"

#include <stdlib.h>
#include <string.h>

#define MAX_DIMS 8

typedef struct {
    int64_t sizes[MAX_DIMS];
    int64_t strides[MAX_DIMS];
    uint64_t dims;
    int64_t offset;
    int type;
    char *data;
} Tensor;

typedef struct {
    uint64_t count;
    int64_t values[];
} IntArray;

typedef struct {
    Tensor input;
    Tensor output;
    int64_t before; /* columns of padding on the left */
} Pad;

static const char zero[16];

static size_t element_size(int acl_type)
{
    switch (acl_type) {
    case 2: case 4: case 12: return 1;             /* int8, uint8, bool */
    case 1: case 6: case 7: case 27: return 2;     /* fp16, int16, uint16, bf16 */
    case 0: case 3: case 8: return 4;              /* fp32, int32, uint32 */
    case 9: case 10: case 11: case 16: return 8;   /* int64, uint64, fp64, complex64 */
    default: return 0;
    }
}

void *aclCreateTensor(const int64_t *sizes, uint64_t dims, int type, const int64_t *strides, int64_t offset,
                      int format, const int64_t *storage_sizes, uint64_t storage_dims, void *data)
{
    if (dims > MAX_DIMS) {
        return NULL;
    }
    Tensor *tensor = calloc(1, sizeof *tensor);
    memcpy(tensor->sizes, sizes, dims * sizeof *sizes);
    memcpy(tensor->strides, strides, dims * sizeof *strides);
    tensor->dims = dims;
    tensor->offset = offset;
    tensor->type = type;
    tensor->data = data;
    return tensor;
}

void *aclCreateIntArray(const int64_t *values, uint64_t count)
{
    IntArray *array = malloc(sizeof *array + count * sizeof *values);
    array->count = count;
    memcpy(array->values, values, count * sizeof *values);
    return array;
}

void *aclCreateScalar(void *value, int type)
{
    char *scalar = calloc(1, sizeof zero);
    memcpy(scalar, value, element_size(type));
    return scalar;
}

static int destroy(const void *object)
{
    free((void *)object);
    return ACL_OK;
}

int aclDestroyTensor(const void *tensor) { return destroy(tensor); }
int aclDestroyIntArray(const void *array) { return destroy(array); }
int aclDestroyScalar(const void *scalar) { return destroy(scalar); }

int aclnnConstantPadNdGetWorkspaceSize(const Tensor *input, const IntArray *padding, const void *value,
                                       Tensor *output, uint64_t *workspace, void **executor)
{
    int known = input && output && input->dims == 2 && padding->count == 2 && element_size(input->type);
    if (!known || memcmp(value, zero, sizeof(double))) {
        return rehearsal_refuse("aclnnConstantPadNd other than padding the columns of a matrix with zero");
    }
    Pad *pad = calloc(1, sizeof *pad);
    pad->input = *input;
    pad->output = *output;
    pad->before = padding->values[0];
    *workspace = 0;
    *executor = pad;
    return ACL_OK;
}

static char *element(Tensor *tensor, int64_t row, int64_t column)
{
    int64_t index = tensor->offset + row * tensor->strides[0] + column * tensor->strides[1];
    return tensor->data + index * element_size(tensor->type);
}

int aclnnConstantPadNd(void *workspace, uint64_t bytes, void *executor, void *stream)
{
    Pad *pad = executor;
    size_t size = element_size(pad->output.type);
    for (int64_t row = 0; row < pad->output.sizes[0]; row++) {
        for (int64_t column = 0; column < pad->output.sizes[1]; column++) {
            int64_t source = column - pad->before;
            int inside = source >= 0 && source < pad->input.sizes[1];
            const char *from = inside ? element(&pad->input, row, source) : zero;
            memcpy(element(&pad->output, row, column), from, size);
        }
    }
    free(pad);
    return ACL_OK;
}
